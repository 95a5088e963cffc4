"""A diffusers video transformer, dense and with neighborhood attention: one line is the difference.

Wan's transformer with two layers and random weights, Wan's head_dim, and a latent video of 6144
tokens. Prints what the backend decided for every attention, how far the result is from the same
model under a brute-force mask, and how long both take. Exits with 1 if the result is wrong.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import reduce
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

import gna_compile

GRID = (8, 24, 32)  # frames, rows and columns of tokens
WINDOW, STRIDE = (4, 12, 16), (2, 4, 8)
POLICY: dict[str, Any] = {
    "version": 1,
    "name": "demo",
    "allow_slow_providers": True,
    "rules": [{"layers": "blocks.*.attn1", "window": list(WINDOW), "stride": list(STRIDE)}],
}
ROUNDS = 5


def main() -> int:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = WanTransformer3DModel(
            num_layers=2, num_attention_heads=4, attention_head_dim=128, ffn_dim=1536, text_dim=256
        )
    for weights in model.parameters():
        if weights.ndim == 2:  # wider than at the start of a training, so that attention has a say
            torch.nn.init.normal_(weights, std=weights.shape[1] ** -0.5)
    model = model.eval().requires_grad_(False)
    if dtype != torch.float32:
        model = model.to(dtype)
    frames, rows, columns = GRID
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 16, frames, 2 * rows, 2 * columns).to(device, dtype),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": torch.randn(1, 77, 256).to(device, dtype),
        "return_dict": False,
    }
    processor = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {device} ({processor}), {dtype}, tokens {GRID}\n")

    dense = torch.compile(model, backend="inductor")
    options: dict[str, Any] = {"policy": POLICY}
    sparse = torch.compile(model, backend="gna", options=options)
    gna_compile.explain(model, policy=POLICY, **inputs)

    print("\nCompiling both ...", flush=True)
    start = time.perf_counter()
    dense_output = dense(**inputs)[0]
    output = sparse(**inputs)[0]
    print(f"done in {time.perf_counter() - start:.0f} s")

    mask = neighborhood_mask().to(device)
    expected = run_masked(model, inputs, mask)
    size = expected.float().std().item()
    error = (output - expected).abs().max().item() / size
    effect = (dense_output - expected).abs().max().item() / size
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    verdict = "right" if error < tolerance < effect else "WRONG"
    print(
        f"\nLargest difference from the masked model, in standard deviations of the output: {verdict}"
    )
    print(f"  gna   {error:.1e}\n  dense {effect:.1e}")

    times = interleaved({"dense": lambda: dense(**inputs), "gna": lambda: sparse(**inputs)}, device)
    share = mask.float().mean().item()
    print(f"\nWhole model under Inductor, median of {ROUNDS} forward passes, taken in turns:")
    for name, seconds in times.items():
        spread = f"{min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}"
        print(f"  {name:5} {statistics.median(seconds) * 1e3:7.1f} ms ({spread})")
    ratio = statistics.median(times["dense"]) / statistics.median(times["gna"])
    print(
        f"  ratio {ratio:.2f}; self-attention keeps {share:.1%} of its FLOPs ({1 / share:.1f} times fewer)"
    )
    return 0 if verdict == "right" else 1


def neighborhood_mask() -> Tensor:
    """Bool [tokens, tokens] from the definition: queries of a stride group share a window."""

    def axis(length: int, window: int, stride: int) -> Tensor:
        position = torch.arange(length)
        leader = (position // stride * stride + stride // 2).clamp(max=length - 1)
        first = (leader - window // 2).clamp(0, length - window)[:, None]
        return (position >= first) & (position < first + window)

    return reduce(torch.kron, map(axis, GRID, WINDOW, STRIDE))


def run_masked(model: torch.nn.Module, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """The model in eager mode, its self-attentions with the mask."""
    attend = F.scaled_dot_product_attention

    def masked(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if key.shape[-2] == len(mask):
            options["attn_mask"] = mask
        return attend(query, key, value, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", masked):
        return model(**inputs)[0]


def interleaved(runs: dict[str, Callable[[], object]], device: str) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns so that a busy machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
