"""Sequences of several grids, and heads that differ: the op beside cuDNN's dense attention.

    python -m benchmarks patterns                 # all cases
    python -m benchmarks patterns flux2-reference

Whole op, forward, bf16, batch 1, head_dim 128, the provider that the op chooses. A case with several
groups of heads is also compared with its groups run alone, one after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

import gna_compile.ops  # noqa: F401 - registers the op
from benchmarks import record, timing
from benchmarks.kernels import OURS, dense
from gna_compile.geometry import (
    AttentionPattern,
    GlobalTokens,
    GridTokens,
    HeadGroup,
    Link,
    Segment,
    Window,
    default_links,
    encode,
    of_heads,
)
from gna_compile.providers import Problem, choose

HEAD_DIM = 128
_TEXT, _IMAGE, _REFERENCE = GlobalTokens(512), GridTokens((256, 256)), GridTokens((64, 64))
_VIDEO = GridTokens((102, 24, 42))
_HALF = GridTokens((128, 128))


def _pattern(
    segments: tuple[Segment, ...],
    *groups: tuple[int, tuple[Window | None, ...]],
    between: Link = Link.FULL,
) -> AttentionPattern:
    links = default_links(segments, between_grids=between)
    head_groups = tuple(HeadGroup(heads, windows) for heads, windows in groups)
    return AttentionPattern(segments, segments, links, head_groups)


_90 = Window((80, 80), (16, 16))
CASES: dict[str, AttentionPattern] = {
    # FLUX.2 at 4096 x 4096 with a reference image of 1024 x 1024: a window on the image alone, on both.
    "flux2-reference": _pattern((_TEXT, _IMAGE, _REFERENCE), (48, (_90, None))),
    "flux2-reference-all": _pattern(
        (_TEXT, _IMAGE, _REFERENCE), (48, (_90, Window((16, 16), (16, 16))))
    ),
    # FLUX Kontext at 2048 x 2048: two images of one size.
    "kontext-2k": _pattern((_TEXT, _HALF, _HALF), (24, (Window((32, 32), (16, 16)),) * 2)),
    "kontext-2k-aligned": _pattern(
        (_TEXT, _HALF, _HALF), (24, (Window((32, 32), (16, 16)),) * 2), between=Link.WINDOW
    ),
    # MiniMax-H3: text and audio before a video.
    "minimax-h3": _pattern(
        (GlobalTokens(1200), _VIDEO), (56, (Window((34, 12, 14), (34, 12, 14)),))
    ),
    # Half of the heads dense, half of them with 10 % of the pairs.
    "flux4k-half-of-heads": _pattern((_IMAGE,), (12, (None,)), (12, (_90,))),
    "flux4k-quarters": _pattern(
        (_IMAGE,), (6, (None,)), (6, (_90,)), (6, (Window((160, 160), (16, 16)),)), (6, (_90,))
    ),
}


@dataclass
class Result:
    """One case measured.

    Attributes:
        pattern: in words.
        provider: who ran each group of heads.
        bound: dense attention's FLOPs over those of the visible pairs.
        ms: median milliseconds of `OURS`, cuDNN, and each group of heads alone.
        failed: why a candidate did not run.
        speedup: over cuDNN's dense attention, the median of the ratios turn by turn.
        of_bound: its share of the bound.
        of_groups: what the groups take alone, over what all take together.
    """

    case: str
    pattern: str
    provider: str
    bound: float
    ms: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    speedup: float | None = None
    of_bound: float | None = None
    of_groups: float | None = None


def main(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CASE]...", help="Which cases; all if none.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Turns of each.")] = 7,
) -> None:
    """Several grids and groups of heads, against cuDNN's dense attention."""
    for name in names or ():
        if name not in CASES:
            raise typer.BadParameter(f"there is no case {name!r}, only {', '.join(CASES)}")
    if not torch.cuda.is_available():
        raise typer.BadParameter("this needs a CUDA device")
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(record.environment(), highlight=False)
    results: list[Result] = []
    for name in names or CASES:
        results.append(measure(name, CASES[name], repeats, "cuda"))
        console.print(results[-1], highlight=False)
        rows = [asdict(result) for result in results]
        path = record.update(f"patterns-{record.gpu()}", "case", rows, CASES)
    console.print(f"written to {path}")


def measure(name: str, pattern: AttentionPattern, repeats: int, device: str) -> Result:
    """Times one case. A candidate that fails is left out, with the reason."""
    shape = (1, pattern.heads, pattern.query_tokens, HEAD_DIM)
    inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3)]
    dense_pairs = pattern.heads * pattern.query_tokens * pattern.key_tokens
    result = Result(name, str(pattern), _providers(pattern, inputs), dense_pairs / pattern.pairs)
    alone = _alone(pattern, inputs) if len(pattern.head_groups) > 1 else {}
    runs: dict[str, Callable[[], Tensor]] = {
        **alone,
        "cudnn": partial(dense, "cudnn", inputs),
        OURS: partial(attend, pattern, inputs),
    }
    outputs, result.failed = timing.first_calls(runs)
    able = {candidate: run for candidate, run in runs.items() if candidate in outputs}
    outputs.clear()
    times = timing.take_turns(able, repeats, timing.clock(device))
    result.ms = timing.medians(times)
    ratios = timing.medians(timing.speedups(times, over="cudnn"))
    if OURS in ratios:
        result.speedup = ratios[OURS]
        result.of_bound = ratios[OURS] / result.bound
    if alone and OURS in result.ms and alone.keys() <= result.ms.keys():
        result.of_groups = sum(result.ms[group] for group in alone) / result.ms[OURS]
    return result


def attend(pattern: AttentionPattern, inputs: list[Tensor]) -> Tensor:
    """The op."""
    order = [0, 1, 2, 3]
    output, _ = torch.ops.gna.attention.v2(*inputs, encode(pattern), None, HEAD_DIM**-0.5, order)
    return output


def _alone(pattern: AttentionPattern, inputs: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Each group of heads by itself."""
    runs: dict[str, Callable[[], Tensor]] = {}
    first = 0
    for number, group in enumerate(pattern.head_groups):
        own = [tensor[:, first : first + group.heads].contiguous() for tensor in inputs]
        runs[f"group {number}"] = partial(attend, replace(pattern, head_groups=(group,)), own)
        first += group.heads
    return runs


def _providers(pattern: AttentionPattern, inputs: list[Tensor]) -> str:
    """Who runs each group of heads."""
    query = inputs[0]
    names = []
    for group in pattern.head_groups:
        problem: Any = Problem(
            device=query.device.type,
            dtype=query.dtype,
            batch=1,
            heads=group.heads,
            kv_heads=group.heads,
            head_dim=HEAD_DIM,
            pattern=of_heads(pattern, group),
            has_key_mask=False,
            query_strides=query.stride(),
            key_strides=query.stride(),
            value_strides=query.stride(),
        )
        names.append(getattr(choose(problem), "name", "none"))
    return ", ".join(names)


if __name__ == "__main__":
    typer.run(main)
