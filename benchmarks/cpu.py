"""The CPU kernel against PyTorch's dense attention, the portable provider and FlexAttention.

Runs of all candidates of a case are interleaved in one process, and the median of each
counts; so a change of clock or of load hits all of them. Speedups are over dense attention.

- *flop bound*: dense FLOPs over the FLOPs that the mask needs: no kernel that computes whole rows
  of it can be faster, at dense attention's rate.
- *tile bound*: the same for the pairs that this kernel's own tiles compute.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks import record
from gna_compile.geometry import AttentionPattern, Neighborhood
from gna_compile.ops import neighborhood_attention
from gna_compile.providers.cpu import tiles

SDPA: Any = torch.nn.functional.scaled_dot_product_attention
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One geometry; `dense` where it hides nothing."""

    name: str
    neighborhood: Neighborhood


def case(
    name: str, grid: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...] | None = None
) -> Case:
    return Case(name, Neighborhood.of(grid, window, stride))


CASES = [
    case("64x64, window 13", (64, 64), (13, 13)),
    case("128x128, window 16, stride 16", (128, 128), (16, 16), (16, 16)),
    case("128x128, window 16", (128, 128), (16, 16)),
    case("16x32x32, window 8x12x12, stride 4", (16, 32, 32), (8, 12, 12), (4, 4, 4)),
    case("16x32x32, window 8x12x12", (16, 32, 32), (8, 12, 12)),
    case("16384, window 1024", (16384,), (1024,)),
    case("4096, dense", (4096,), (4096,)),
]


@dataclass
class Row:
    """One case measured; milliseconds, None where a candidate cannot run."""

    case: str
    head_dim: int
    dtype: str
    flop_bound: float
    tile_bound: float
    dense: float
    portable: float
    ours: float
    flex: float | None
    dense_training: float
    portable_training: float
    ours_training: float


def main(
    rounds: Annotated[int, typer.Option(help="How often each candidate runs.")] = 7,
    heads: Annotated[int, typer.Option(help="Attention heads, batch 1.")] = 2,
    threads: Annotated[int, typer.Option(help="Threads; 0 for PyTorch's own choice.")] = 0,
    flex: Annotated[bool, typer.Option(help="Whether FlexAttention takes part.")] = True,
    only: Annotated[str, typer.Option(help="Run cases whose name contains this.")] = "",
) -> None:
    """The CPU kernel against dense attention, FlexAttention and the portable provider."""
    console = Console()
    if threads:
        torch.set_num_threads(threads)
    about = record.environment() | {"heads": heads}
    rows: list[Row] = []
    for the_case, head_dim, dtype in itertools.product(CASES, (64, 128), DTYPES):
        if only in the_case.name:
            rows.append(measure(the_case, head_dim, dtype, heads, rounds, flex))
            console.print(summary(rows[-1]))
            # After every row: the whole takes a quarter of an hour.
            record.save("cpu", {"heads": heads, "rows": [asdict(row) for row in rows]})
            (record.RESULTS / "cpu.md").write_text(markdown(rows, about))
    plot(rows, about, record.RESULTS / "cpu.svg")


def measure(
    the_case: Case, head_dim: int, dtype: str, heads: int, rounds: int, with_flex: bool
) -> Row:
    neighborhood = the_case.neighborhood
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, neighborhood.tokens, head_dim)
    query, key, value, grad = (
        torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(4)
    )

    def ours(provider: str) -> Callable[[Tensor, Tensor, Tensor], Any]:
        axes = neighborhood.axes
        geometry: dict[str, Any] = {
            "grid": neighborhood.grid,
            "window": [axis.window for axis in axes],
            "stride": [axis.stride for axis in axes],
        }
        return lambda *qkv: neighborhood_attention(*qkv, **geometry, provider=provider)

    def inference(attend: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: attend(query, key, value)

    def training(attend: Callable[..., Any]) -> Callable[[], Any]:
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        return lambda: torch.autograd.grad(attend(*leaves), leaves, grad)

    candidates = {
        "dense": inference(SDPA),
        "portable": inference(ours("portable")),
        "ours": inference(ours("cpu")),
        "dense_training": training(SDPA),
        "portable_training": training(ours("portable")),
        "ours_training": training(ours("cpu")),
    }
    if with_flex:
        run = flex_candidate(neighborhood, query, key, value)
        if run is not None:
            candidates["flex"] = run
    medians = take_turns(candidates, rounds)
    tile_pairs = tiles.pairs(AttentionPattern.of_neighborhood(neighborhood, 1))
    return Row(
        the_case.name,
        head_dim,
        dtype,
        1 / neighborhood.flop_share,
        neighborhood.tokens**2 / tile_pairs,
        **{"flex": None, **medians},  # type: ignore[arg-type]
    )


def take_turns(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each; one round before the first warms up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if index:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def flex_candidate(
    neighborhood: Neighborhood, query: Tensor, key: Tensor, value: Tensor
) -> Callable[[], Any] | None:
    """FlexAttention, compiled, with the same mask; None where it does not run."""
    torch._dynamo.reset()
    try:
        mask = flex_mask(neighborhood)
        compiled: Any = torch.compile(flex_attention)
        with torch.no_grad():
            actual = compiled(query, key, value, block_mask=mask)
        expected = neighborhood_attention(
            query,
            key,
            value,
            grid=neighborhood.grid,
            window=[axis.window for axis in neighborhood.axes],
            stride=[axis.stride for axis in neighborhood.axes],
        )
    except Exception as error:
        print(f"FlexAttention does not run: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)

    def run() -> None:
        with torch.no_grad():
            compiled(query, key, value, block_mask=mask)

    return run


def flex_mask(neighborhood: Neighborhood) -> BlockMask:
    """The mask as FlexAttention takes it, from one table of windows per axis."""
    tables = []
    for axis in neighborhood.axes:
        keys = [axis.keys(query) for query in range(axis.length)]
        tables.append((torch.tensor([k.start for k in keys]), torch.tensor([k.stop for k in keys])))
    sizes = neighborhood.grid

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen, step = query >= 0, 1
        for size, (first, stop) in reversed(list(zip(sizes, tables, strict=True))):
            q, k = query // step % size, key // step % size
            seen = seen & (k >= first[q]) & (k < stop[q])
            step *= size
        return seen

    tokens = neighborhood.tokens
    return create_block_mask(visible, None, None, tokens, tokens, device="cpu", _compile=True)


def summary(row: Row) -> str:
    flex = f"{row.flex / row.ours:.1f}x flex" if row.flex else "flex does not run"
    return (
        f"{row.case}, {row.head_dim}, {row.dtype}: forward {row.dense / row.ours:.2f}x, training "
        f"{row.dense_training / row.ours_training:.2f}x (bounds: tile {row.tile_bound:.2f}x, flop "
        f"{row.flop_bound:.2f}x); {flex}"
    )


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    columns = [
        "case",
        "head_dim",
        "dtype",
        "dense, ms",
        "ours, ms",
        "ours",
        "of tile bound",
        "of FLOP bound",
        "ours, training",
        "of tile bound",
        "FlexAttention",
        "portable",
        "portable, training",
    ]
    lines = [
        "<!-- written by python -m benchmarks cpu -->",
        f"Speedups over dense attention. {about['cpu']}, {about['threads']} threads, batch 1, "
        f"{about['heads']} heads, torch {about['versions']['torch']}, commit "
        f"{about['commit'][:10]}. Training is forward and backward.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        forward, training = row.dense / row.ours, row.dense_training / row.ours_training
        cells = [
            row.case,
            str(row.head_dim),
            row.dtype,
            f"{row.dense:.1f}",
            f"{row.ours:.1f}",
            f"{forward:.2f}×",
            f"{forward / row.tile_bound:.2f}",
            f"{forward / row.flop_bound:.2f}",
            f"{training:.2f}×",
            f"{training / row.tile_bound:.2f}",
            f"{row.dense / row.flex:.2f}×" if row.flex else "–",
            f"{row.dense / row.portable:.2f}×",
            f"{row.dense_training / row.portable_training:.2f}×",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], about: dict[str, Any], path: Path) -> None:
    """Bars of forward speedups over dense attention; says so and does nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'gna-compile[plot]')")
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    labels = [f"{row.case}\n{row.head_dim}, {row.dtype}" for row in rows]
    figure, axes = pyplot.subplots(figsize=(9, 0.55 * len(rows) + 1.5))
    bars = [
        ("ours", "tab:blue", [row.dense / row.ours for row in rows]),
        ("FlexAttention", "tab:orange", [row.dense / row.flex if row.flex else 0 for row in rows]),
        ("portable", "tab:gray", [row.dense / row.portable for row in rows]),
    ]
    for index, (name, color, values) in enumerate(bars):
        places = [place + 0.27 * (index - 1) for place in range(len(rows))]
        axes.barh(places, values, height=0.25, label=name, color=color)
    bounds = [row.tile_bound for row in rows]
    axes.plot(bounds, range(len(rows)), "k|", markersize=14, label="tile bound")
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_xlabel("speedup over dense attention, forward")
    title = f"{about['cpu']}, {about['threads']} threads, torch {about['versions']['torch']}"
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
