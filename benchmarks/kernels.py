"""Kernel times on this machine's GPU: cuDNN's dense attention, gna-compile's kernel and, on request,
FlexAttention, side by side in one run.

    python -m benchmarks.kernels                    # all cases
    python -m benchmarks.kernels hunyuan-na ltx-11  # some of them
    python -m benchmarks.kernels --json results.json --repeats 11

A card's clock drifts with its power and heat, so no time is compared across runs: the peers take
turns, and the speedup over cuDNN is the median of the ratios of neighbouring turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gna_compile.geometry import Neighborhood
from gna_compile.ops import neighborhood_attention

_SHORTEST = 4.0  # milliseconds that one turn takes at least; short calls are repeated within it


@dataclass(frozen=True)
class Case:
    """One attention: a grid, its window, and how many times faster than cuDNN we mean to be.

    Args:
        goal: speedup over cuDNN's dense attention; None where it is a share of the FLOP bound.
        share: goal as a share of the FLOP bound.
        shown: of the global tokens, how many the key mask leaves visible; None for no mask.
    """

    grid: tuple[int, ...]
    heads: int
    head_dim: int
    window: tuple[int, ...]
    stride: tuple[int, ...]
    goal: float | None = None
    share: float | None = None
    dilation: tuple[int, ...] | None = None
    prefix: int = 0
    suffix: int = 0
    shown: int | None = None

    @property
    def neighborhood(self) -> Neighborhood:
        return Neighborhood.of(
            self.grid,
            self.window,
            self.stride,
            self.dilation,
            prefix=self.prefix,
            suffix=self.suffix,
        )

    @property
    def flops(self) -> int:
        """Of the visible pairs; a hidden global key counts as visible."""
        return 4 * self.neighborhood.pairs * self.heads * self.head_dim

    @property
    def bound(self) -> float:
        return 1 / self.neighborhood.flop_share

    @property
    def target(self) -> float:
        return self.goal if self.goal is not None else (self.share or 0.0) * self.bound


_VIDEO = ((30, 48, 80), 24, 128)
_IMAGE = ((256, 256), 24, 128)
_WORLD = ((16, 44, 80), 32, 128)
_WAN = ((21, 45, 80), 40, 128)
_SEQUENCE = ((32768,), 24, 128)
_LTX = ((32, 64, 96), 8, 64)

CASES = {
    "hunyuan-gna": Case(*_VIDEO, (18, 24, 24), (16, 8, 8), 11.1),
    "hunyuan-na": Case(*_VIDEO, (18, 24, 24), (1, 1, 1), 6.0),
    "hunyuan-58": Case(*_VIDEO, (30, 40, 40), (1, 32, 8), 2.4),
    "flux4k-gna": Case(*_IMAGE, (80, 80), (16, 16), 10.2),
    "flux4k-na": Case(*_IMAGE, (80, 80), (1, 1), 7.4),
    "cosmos-56-gna": Case(*_WORLD, (16, 32, 48), (1, 8, 16), 2.29),
    "cosmos-89-gna": Case(*_WORLD, (16, 24, 16), (1, 8, 16), 9.1),
    "cosmos-89-na": Case(*_WORLD, (16, 24, 16), (1, 1, 1), 6.8),
    "wan720p-gna": Case(*_WAN, (12, 24, 24), (4, 8, 8), 9.3),
    "wan720p-na": Case(*_WAN, (11, 23, 27), (1, 1, 1), 5.2),
    "1d-32k": Case(*_SEQUENCE, (2048,), (256,), 15.0),
    "1d-32k-na": Case(*_SEQUENCE, (2048,), (1,), 13.5),
    "ltx-11": Case(*_LTX, (11, 11, 11), (1, 1, 1), 40.0),
    "ltx-355": Case(*_LTX, (3, 5, 5), (1, 1, 1), 150.0),
    "dense": Case(*_SEQUENCE, (32768,), (1,), 1.0),
    "dense-64": Case(*_LTX, (32, 64, 96), (1, 1, 1), 1.0),
    "flux4k-text": Case(*_IMAGE, (80, 80), (16, 16), share=0.97, prefix=512),
    "hunyuan-text": Case(*_VIDEO, (18, 24, 24), (16, 8, 8), share=0.97, suffix=256, shown=100),
    "dilated": Case((16, 44, 80), 16, 128, (16, 4, 16), (1, 1, 1), share=0.5, dilation=(1, 11, 5)),
}


@dataclass(frozen=True)
class Result:
    """Medians of one case; times in milliseconds."""

    case: str
    cudnn: float
    ours: float
    flex: float | None
    speedup: float
    ratios: list[float]
    target: float
    bound: float
    tflops: float


def measure(name: str, case: Case, repeats: int, provider: str, with_flex: bool) -> Result:
    """Times one case; the peers take turns."""
    neighborhood = case.neighborhood
    shape = (1, case.heads, neighborhood.tokens, case.head_dim)
    query, key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    key_mask = None
    if case.shown is not None:
        key_mask = torch.arange(neighborhood.global_tokens, device="cuda")[None] < case.shown

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(query, key, value)

    def ours() -> object:
        return neighborhood_attention(
            query,
            key,
            value,
            grid=case.grid,
            window=case.window,
            stride=case.stride,
            dilation=case.dilation,
            prefix=case.prefix,
            suffix=case.suffix,
            key_mask=key_mask,
            provider=provider,
        )

    peers: list[Callable[[], object]] = [cudnn, ours]
    if with_flex:
        peers.append(_flex(case, query, key, value))
    calls = [max(1, round(_SHORTEST / _time(peer, 1, warm=True))) for peer in peers]
    times = [
        [_time(peer, count) for peer, count in zip(peers, calls, strict=True)]
        for _ in range(repeats)
    ]
    ratios = [turn[0] / turn[1] for turn in times]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return Result(
        name,
        medians[0],
        medians[1],
        medians[2] if with_flex else None,
        statistics.median(ratios),
        ratios,
        case.target,
        case.bound,
        case.flops / medians[1] * 1e-9,
    )


def _time(run: Callable[[], object], calls: int, warm: bool = False) -> float:
    """Milliseconds per call."""
    if warm:
        run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / calls


def _flex(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], object]:
    """FlexAttention on the tokens in raster order."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.prefix or case.suffix or case.dilation:
        raise SystemExit("--flex: global tokens and dilation are left out of this comparison")
    axes = case.neighborhood.axes

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = torch.ones_like(q, dtype=torch.bool)
        for axis in reversed(axes):
            at, to = q % axis.length, k % axis.length
            leader = at // axis.stride * axis.stride + axis.stride // 2
            leader = leader.clamp(max=axis.length - 1)
            first = (leader - axis.window // 2).clamp(0, axis.length - axis.window)
            seen = seen & (to >= first) & (to < first + axis.window)
            q, k = q // axis.length, k // axis.length
        return seen

    tokens = query.shape[2]
    mask = create_block_mask(visible, None, None, tokens, tokens, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=mask)


def table(results: list[Result]) -> str:
    """The results as text."""
    lines = [
        f"{'case':14}{'cuDNN ms':>10}{'flex ms':>9}{'ours ms':>9}{'speedup':>9}{'goal':>8}"
        f"{'bound':>8}{'TFLOP/s':>9}"
    ]
    for result in results:
        met = "" if result.speedup >= 0.98 * result.target else "  below its goal"
        flex = f"{result.flex:9.2f}" if result.flex is not None else f"{'–':>9}"
        lines.append(
            f"{result.case:14}{result.cudnn:10.2f}{flex}{result.ours:9.3f}{result.speedup:9.2f}"
            f"{result.target:8.2f}{result.bound:8.2f}{result.tflops:9.0f}{met}"
        )
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each peer (default 7)")
    parser.add_argument("--provider", default="sm90", help="which kernel is ours (default sm90)")
    parser.add_argument("--flex", action="store_true", help="also time FlexAttention")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA device")
    torch.manual_seed(0)
    results = []
    for name in arguments.cases or CASES:
        result = measure(name, CASES[name], arguments.repeats, arguments.provider, arguments.flex)
        results.append(result)
        print(table([result]).splitlines()[1], flush=True)
    print(f"\n{machine()}\n{table(results)}")
    if arguments.json:
        data = {"machine": machine(), "results": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
