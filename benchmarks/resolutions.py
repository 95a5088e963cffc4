"""Several resolutions and aspect ratios in one process: how often a model is compiled, and how long.

As a pipeline would call it: `torch.compile` with its defaults, which makes a size dynamic when it
has changed once; each backend begins with empty caches. Shipped policies; FLUX is prepared, so its
grid is read off each call's position ids.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters

import gna_compile
from benchmarks import record
from benchmarks.models import (
    CASES,
    DTYPES,
    TINY_POLICY,
    Grid,
    build,
    caches,
    creating,
    step_ms,
    timed,
)
from gna_compile.policy import DEFAULT_PHASE, policy_text
from gna_compile.report.collect import collecting

GRIDS: dict[str, list[Grid]] = {
    "flux": [(256, 256), (192, 256), (256, 192), (128, 128)],
    "hunyuan-video": [(30, 48, 80), (30, 80, 48), (24, 40, 64)],
    "wan": [(21, 45, 80), (21, 80, 45), (17, 40, 64)],
    "cosmos": [(16, 44, 80), (16, 80, 44), (16, 32, 48)],
}
TINY_GRIDS: dict[str, list[Grid]] = {
    "flux": [(12, 16), (16, 12), (12, 12)],
    **{name: [(4, 6, 8), (4, 8, 6), (6, 6, 8)] for name in ("hunyuan-video", "wan", "cosmos")},
}


@dataclass
class Call:
    """The first call with a grid, and a step after that.

    Attributes:
        graphs: how many graphs Dynamo compiled for it.
        first_s: seconds of the first call.
        ms: milliseconds of a later one.
        rewritten: sites rewritten in those graphs; 0 where none was compiled, too.
    """

    model: str
    layers: int
    dtype: str
    backend: str
    grid: Grid
    graphs: int
    first_s: float
    ms: float
    rewritten: int


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Which models; all if none.")] = None,
    layers: Annotated[int, typer.Option(help="Blocks (of the first kind).")] = 1,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    tiny: Annotated[bool, typer.Option(help="Narrow models, small grids, on the CPU.")] = False,
) -> None:
    """Compilations of a process that sees several resolutions, dense and gna."""
    if not tiny and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU: --tiny runs on the CPU")
    console = Console(width=None if sys.stdout.isatty() else 120)
    calls: list[Call] = []
    for name in models or CASES:
        if name not in CASES:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(CASES)}")
        for backend in ("inductor", "gna"):
            with tempfile.TemporaryDirectory() as folder, caches(Path(folder)):
                calls += measure(name, backend, layers, dtype, tiny)
        console.print(table([call for call in calls if call.model == name]))
        if not tiny:
            rows = [asdict(call) for call in calls]
            record.update(f"resolutions-{record.gpu()}", "model", rows, CASES)


def measure(name: str, backend: str, layers: int, dtype: str, tiny: bool) -> list[Call]:
    device = "cpu" if tiny else "cuda"
    case, grids = CASES[name], (TINY_GRIDS if tiny else GRIDS)[name]
    text = 14 if tiny else case.text
    model: Any = build(case, grids[0], text, layers, 1, DTYPES[dtype], tiny, device)[0]
    policy: Any = TINY_POLICY if tiny else case.policy
    options: dict[str, Any] = {}
    if backend == "gna" and name == "flux":
        # The policy's layout holds for one grid.
        gna_compile.prepare(model, TINY_POLICY if tiny else without_layout(policy))
    elif backend == "gna":
        options = {"options": {"policy": policy}}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, **options)
    calls = []
    for grid in grids:
        with creating(DTYPES[dtype], device):
            inputs = case.inputs(grid, text, 1, model)

        def run(inputs: dict[str, Any] = inputs) -> torch.Tensor:
            with torch.no_grad():
                output: torch.Tensor = compiled(**inputs)[0]
            return output

        before = counters["stats"]["unique_graphs"]
        with collecting() as records:
            _, first_s = timed(run, device)
        rows = [row for graph in records for row in graph.rows if row.phase == DEFAULT_PHASE]
        calls.append(
            Call(
                model=name,
                layers=layers,
                dtype=dtype,
                backend=backend,
                grid=grid,
                graphs=counters["stats"]["unique_graphs"] - before,
                first_s=first_s,
                ms=step_ms(run, device),
                rewritten=sum(row.decision == "gna" for row in rows),
            )
        )
    return calls


def table(calls: list[Call]) -> Table:
    text = Table("model", "backend", "grid", "graphs", "first call", "later", "rewritten", box=None)
    for call in calls:
        grid = "x".join(map(str, call.grid))
        times = f"{call.first_s:.1f} s", f"{call.ms:.1f} ms"
        text.add_row(call.model, call.backend, grid, str(call.graphs), *times, str(call.rewritten))
    return text


def without_layout(policy: str) -> dict[str, Any]:
    """A shipped policy for other grids than the one that it declares."""
    keys: dict[str, Any] = yaml.safe_load(policy_text(policy))
    return {key: value for key, value in keys.items() if key != "layout"}
