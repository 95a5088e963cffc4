"""`gna simulate`: what a window costs in tiles and how fast it will be, before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from gna_compile.geometry import AttentionPattern, GeometryError, Neighborhood
from gna_compile.planner import ARCHITECTURES, Plan, PlanError, Tiling, Workload, plan, plan_with
from gna_compile.policy import PolicyError
from gna_compile.simulate import tables
from gna_compile.simulate.front import pareto_front, recommended, rule_text
from gna_compile.simulate.picture import draw
from gna_compile.simulate.problems import Entry, SimulateError, named


def simulate(
    target: Annotated[
        str,
        typer.Argument(help="A case (hunyuan-gna, ...), a shipped policy, or a policy's path."),
    ] = "",
    grid: Annotated[str, typer.Option(help="Token grid, one number per axis: 30,48,80.")] = "",
    window: Annotated[str, typer.Option(help="Window.")] = "",
    stride: Annotated[str, typer.Option(help="Stride; default 1.")] = "",
    dilation: Annotated[str, typer.Option(help="Dilation; default 1.")] = "",
    causal: Annotated[str, typer.Option(help="1 for a causal axis, 0 for another.")] = "",
    prefix: Annotated[int | None, typer.Option(help="Global tokens before the grid.")] = None,
    suffix: Annotated[int | None, typer.Option(help="Global tokens after the grid.")] = None,
    heads: Annotated[int | None, typer.Option(help="Batch x heads; default 24.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="head_dim; default 128.")] = None,
    arch: Annotated[
        str, typer.Option(help=f"Cost table: {', '.join(ARCHITECTURES)}, or cpu.")
    ] = "sm90",
    tiling: Annotated[
        str, typer.Option(help="Key tiles start at the window (dynamic) or on a grid (static).")
    ] = "dynamic",
    query_box: Annotated[str, typer.Option(help="Query tile, with --key-box; default best.")] = "",
    key_box: Annotated[str, typer.Option(help="Key tile, with --query-box; default best.")] = "",
    flat: Annotated[
        str, typer.Option(help="Also flattened tiles; numbers of queries and keys: 128,128.")
    ] = "",
    attention_share: Annotated[
        float | None, typer.Option(help="Attention's share of a dense run's time, 0 to 1.")
    ] = None,
    dense_steps: Annotated[str, typer.Option(help="Steps that stay dense: 15/50.")] = "",
    search: Annotated[
        bool, typer.Option("--search", help="List the windows and strides worth having instead.")
    ] = False,
    sparsity: Annotated[
        float, typer.Option(help="With --search: the most that the printed rule leaves out.")
    ] = 0.9,
    plot: Annotated[Path | None, typer.Option(help="Draw the first column too: out.png.")] = None,
    query: Annotated[str, typer.Option(help="With --plot: a query's place on the grid.")] = "",
) -> None:
    """Counts tiles and predicts speedups of a window, a named case, or every rule of a policy."""
    console, errors = Console(), Console(stderr=True)
    try:
        model = {"prefix": prefix, "suffix": suffix, "heads": heads, "head_dim": head_dim}
        texts = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
        entries = _entries(target, grid, model, texts, search)
        if attention_share is not None:
            entries = [replace(entry, attention_share=attention_share) for entry in entries]
        if dense_steps:
            dense, steps = _numbers("--dense-steps", dense_steps, least=0, separator="/", count=2)
            entries = [replace(entry, dense_steps=(dense, steps)) for entry in entries]
        for entry in entries:
            if entry.workload is None:
                text = escape(f"{entry.name}: {entry.problem}")
                errors.print(text, highlight=False, soft_wrap=True)
        problems = [(entry, entry.workload) for entry in entries if entry.workload is not None]
        if not problems:
            raise typer.Exit(1)
        boxes = [
            _numbers(name, text) if text else None
            for name, text in (("--query-box", query_box), ("--key-box", key_box))
        ]
        tiles = {"--flat": flat, "--plot": plot, "--query-box": query_box, "--key-box": key_box}
        unused = [name for name, value in tiles.items() if value]
        if (search or arch == "cpu") and unused:
            mode = "--search" if search else "--arch cpu"
            raise SimulateError(f"{mode} has no use for {', '.join(unused)}: leave out")
        if search:
            _search(console, problems[0][1], arch, sparsity)
        elif arch == "cpu":
            _on_cpu(console, problems)
        else:
            plans = [(entry, _plan(work, arch, tiling, boxes)) for entry, work in problems]
            flattened = None
            if flat:
                query_tile, key_tile = _numbers("--flat", flat, count=2)
                flattened = query_tile, key_tile
            console.print(tables.plans_table(plans, flattened))
            for line in tables.hints(plans):
                console.print(line, highlight=False, soft_wrap=True)
            if plot:
                place = _numbers("--query", query, least=0) if query else None
                draw(plans[0][1], plot, place)
    except (SimulateError, PlanError, GeometryError, PolicyError) as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _entries(
    target: str, grid: str, model: dict[str, int | None], texts: dict[str, str], search: bool
) -> list[Entry]:
    """What the options ask for: a named case or policy, or one problem."""
    given: dict[str, Any] = {key: value for key, value in model.items() if value is not None}
    if grid:
        given["grid"] = _numbers("--grid", grid)
    parameters: dict[str, tuple[int, ...]] = {
        name: _numbers(f"--{name}", text, least=0 if name == "causal" else 1)
        for name, text in texts.items()
        if text
    }
    if "causal" in parameters:
        if max(parameters["causal"]) > 1:
            raise SimulateError(f"--causal {texts['causal']!r} must be 0 or 1 for each axis")
        parameters["causal"] = tuple(map(bool, parameters["causal"]))
    if not target:
        return [_given(given, parameters, search)]
    if parameters:
        raise SimulateError(f"{target} has its own {', '.join(parameters)}: leave them out")
    return named(target, given)


def _given(model: dict[str, Any], parameters: dict[str, Any], search: bool) -> Entry:
    if "grid" not in model or not ("window" in parameters or search):
        raise SimulateError(
            "nothing to simulate: give a case, a policy, or --grid with --window or --search"
        )
    if search and parameters:
        raise SimulateError(f"--search chooses {', '.join(parameters)} itself: leave out")
    grid = model["grid"]
    neighborhood = Neighborhood.of(
        grid,
        **{"window": grid, **parameters},
        prefix=model.get("prefix", 0),
        suffix=model.get("suffix", 0),
    )
    return Entry(
        "given", Workload(neighborhood, model.get("heads", 24), model.get("head_dim", 128))
    )


def _plan(
    workload: Workload, architecture: str, tiling: str, boxes: list[tuple[int, ...] | None]
) -> Plan:
    if tiling not in ("dynamic", "static"):
        raise SimulateError(f"--tiling {tiling!r} must be dynamic or static")
    kind: Tiling = "static" if tiling == "static" else "dynamic"
    query_box, key_box = boxes
    if query_box and key_box:
        return plan_with(workload, query_box, key_box, architecture, kind)
    if query_box or key_box:
        raise SimulateError("--query-box and --key-box go together: give both or neither")
    return plan(workload, architecture, kind)


def _on_cpu(console: Console, problems: list[tuple[Entry, Workload]]) -> None:
    try:
        from gna_compile.providers.cpu.tiles import predicted_speedup
    except ImportError:  # the native kernel is not built
        from gna_compile.providers.portable.cuts import predicted_speedup

    rows = []
    for entry, workload in problems:
        neighborhood = workload.neighborhood
        speedup = predicted_speedup(AttentionPattern.of_neighborhood(neighborhood, 1))
        rows.append((entry, neighborhood, speedup))
    console.print(tables.cpu_table(rows))


def _search(console: Console, workload: Workload, architecture: str, sparsity: float) -> None:
    if not 0 < sparsity < 1:
        raise SimulateError(f"--sparsity {sparsity:g} must lie between 0 and 1")
    front = pareto_front(workload, architecture)
    console.print(tables.front_table(front))
    best = recommended(front, sparsity)
    if best is None:
        raise SimulateError(f"nothing on the front leaves out {sparsity:.0%} or less")
    console.print(f"\nThe fastest rule that leaves out at most {sparsity:.0%}:\n")
    print(rule_text(best))


def _numbers(
    option: str, text: str, least: int = 1, separator: str = ",", count: int = 0
) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(separator))
    except ValueError:
        numbers = ()
    example = separator.join(["15", "50", "80"][: count or 3])
    if not numbers or (count and len(numbers) != count):
        wanted = str(count) if count else "1 to 3"
        raise SimulateError(f"{option} {text!r} must be {wanted} whole numbers, like {example}")
    if min(numbers) < least:
        raise SimulateError(f"{option} {text!r} must be whole numbers of at least {least}")
    return numbers
