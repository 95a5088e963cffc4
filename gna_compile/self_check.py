"""Runs small problems through one provider and compares them with the portable one.

`python -m gna_compile.self_check sm90 cuda:0`; exits with what is wrong, if anything is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from gna_compile.ops import neighborhood_attention
from gna_compile.providers.cuda.first_use import READY

_TOLERANCE = 0.02  # ||error|| / ||expected||; bf16 rounds to 0.004


def check(provider: str, device: str) -> str | None:
    """Runs small problems through each of a provider's kernels: what is wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    geometry: dict[str, Any] = {"grid": (9, 30), "window": (5, 11), "stride": (1, 3), "prefix": 7}
    tokens = 9 * 30 + 7
    key_mask = (torch.arange(7) != 2)[None].to(device)
    for head_dim in (64, 128):
        for dtype in (torch.bfloat16, torch.float16):
            inputs = [
                torch.randn(1, 2, tokens, head_dim, generator=generator).to(device, dtype)
                for _ in range(3)
            ]
            for x in inputs[1:]:
                x[:, :, 2] = torch.nan  # hidden by the mask
            options: dict[str, Any] = {**geometry, "key_mask": key_mask, "return_logsumexp": True}
            actual = neighborhood_attention(*inputs, **options, provider=provider)
            exact = [x.float() for x in inputs]
            wanted = neighborhood_attention(*exact, **options, provider="portable")
            for name, a, b in zip(("output", "logsumexp"), actual, wanted, strict=True):
                error = float((a.float() - b).norm() / b.norm())
                if not error < _TOLERANCE:
                    return f"{name} of {dtype}, head_dim {head_dim}: relative error {error:.3g}"
    return None


def main() -> None:
    """Checks the provider and the device that the arguments name."""
    provider, device = sys.argv[1:]
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)  # providers ask the current device what it can do
    wrong = check("portable", device)
    if wrong is None:
        print(READY, flush=True)
        wrong = check(provider, device)
    if wrong is not None:
        sys.exit(wrong)


if __name__ == "__main__":
    main()
