"""`gna simulate`: its output, its errors, flattened tiles, the front, the picture."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from gna_compile.cli import app
from gna_compile.geometry import Axis, GeometryError, Neighborhood
from gna_compile.planner import Plan, Tiling, Workload, plan, plan_with, speedups
from gna_compile.policy import load_policy, shipped_policies
from gna_compile.simulate.cases import CASES, MODELS
from gna_compile.simulate.flat import MAX_TOKENS, flat_counts
from gna_compile.simulate.front import Point, pareto_front, recommended, rule_text
from gna_compile.simulate.picture import key_tiles

TILINGS: tuple[Tiling, ...] = ("dynamic", "static")


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["simulate", *args], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    lines = [line.rstrip() for line in result.output.splitlines() if "╇" not in line]
    return "\n".join(lines).replace("│", "|").replace("┃", "|")


def figures(*args: str) -> dict[str, dict[str, str]]:
    """The columns of the table by their names, each its cells by the names of the lines."""
    lines = [[cell.strip() for cell in line.split("|")] for line in run(*args).splitlines()]
    names, *rows = [line for line in lines if len(line) > 1]
    columns = {name: {row[0]: row[at] for row in rows} for at, name in enumerate(names)}
    del columns[names[0]]
    return columns


def test_a_case() -> None:
    assert_expected_inline(
        run("hunyuan-na", "--flat", "128,128"),
        """\
 sm90               |  hunyuan-na
 grid               |    30x48x80
 window             |    18x24x24
 stride             |       1x1x1
 query box          |       2x8x8
 key box            |       2x8x8
 visited (most)     | 131.0 (160)
 masked             |         66%
 FLOP bound         |      11.11x
 mean tile          |       6.87x
 simulator          |       5.62x
 predicted          |       6.34x
 ms                 |       40.50
 ms if dense        |      257.00
 flattened 128, 128 |
 - visited (most)   | 279.0 (288)
 - masked           |        100%
 - mean tile        |       3.23x
 - simulator        |       3.12x""",
    )


def test_a_given_window_with_a_hint_and_a_whole_run() -> None:
    assert_expected_inline(
        run(
            *("--grid", "30,48,80", "--window", "18,24,24", "--stride", "1,8,8"),
            *("--attention-share", "0.607", "--dense-steps", "15/50", "--arch", "sm100"),
        ),
        """\
 sm100          |     given
 grid           |  30x48x80
 window         |  18x24x24
 stride         |     1x8x8
 query box      |     4x8x8
 key box        |     2x8x8
 visited (most) | 87.8 (99)
 masked         |       15%
 FLOP bound     |    11.11x
 mean tile      |     9.62x
 simulator      |     9.09x
 predicted      |     9.37x
 ms             |     14.45
 ms if dense    |    135.34
 whole run      |     1.61x
hint: given: with stride 4x8x8 no key tile would need a mask""",
    )


def test_a_policy_by_rule() -> None:
    assert_expected_inline(
        run("cosmos-predict2-2b", "--grid", "8,44,80"),
        """\
 sm90           | rules[0] |  rules[1] |  rules[2] |  rules[3] |  rules[4]
 grid           |  8x44x80 |   8x44x80 |   8x44x80 |   8x44x80 |   8x44x80
 window         |   8x4x16 |   8x12x16 |   8x12x24 |   8x28x56 |   8x20x40
 stride         |    1x1x1 |     1x4x1 |     1x4x8 |     1x4x8 |     1x4x8
 dilation       |   1x11x5 |     1x1x5 |         - |         - |         -
 query box      |   8x1x16 |    2x4x16 |     4x4x8 |     4x4x8 |     4x4x8
 key box        |   8x1x16 |    2x4x16 |     4x4x8 |     4x4x8 |     4x4x8
 visited (most) |  4.0 (4) | 12.0 (12) | 18.0 (18) | 98.0 (98) | 50.0 (50)
 masked         |       0% |        0% |        0% |        0% |        0%
 FLOP bound     |   55.00x |    18.33x |    12.22x |     2.24x |     4.40x
 mean tile      |   55.00x |    18.33x |    12.22x |     2.24x |     4.40x
 simulator      |   55.00x |    18.33x |    12.22x |     2.24x |     4.40x
 predicted      |   37.10x |    15.88x |    11.11x |     2.22x |     4.27x
 ms             |     0.28 |      0.66 |      0.94 |      4.69 |      2.44
 ms if dense    |    10.41 |     10.41 |     10.41 |     10.41 |     10.41""",
    )


def test_the_cpu_by_its_own_costs() -> None:
    assert_expected_inline(
        run("--grid", "64,64", "--window", "16,16", "--stride", "4,4", "--arch", "cpu"),
        """\
 cpu        |  given
 grid       |  64x64
 window     |  16x16
 stride     |    4x4
 FLOP bound | 16.00x
 predicted  | 11.05x""",
    )


def test_the_papers_boxes() -> None:
    found = figures(
        *("--grid", "30,48,80", "--window", "18,24,24", "--tiling", "static"),
        *("--query-box", "4,8,8", "--key-box", "2,8,8"),
    )
    assert found["given"]["simulator"] == "3.27x"


def test_all_parameters() -> None:
    found = figures(
        *("--grid", "64,60", "--window", "8,6", "--stride", "4,1", "--dilation", "2,3"),
        *("--causal", "0,1", "--prefix", "7", "--suffix", "9", "--heads", "3", "--head-dim", "64"),
    )["given"]
    neighborhood = Neighborhood.of((64, 60), (8, 6), (4, 1), (2, 3), (False, True), 7, 9)
    cut = plan(Workload(neighborhood, 3, 64), "sm90")
    assert found["grid"] == "7 + 64x60 + 9"
    given = [found[name] for name in ("window", "stride", "dilation", "causal")]
    assert given == ["8x6", "4x1", "2x3", "no yes"]
    assert found["visited (most)"] == f"{cut.grid.visited.mean:.1f} ({cut.grid.visited.max})"
    assert found["predicted"] == f"{speedups(cut).predicted:.2f}x"


@pytest.mark.parametrize("name", [*CASES, *shipped_policies()])
def test_every_preset(name: str) -> None:
    columns = figures(name)
    assert list(columns) == (
        [name]
        if name in CASES
        else [f"rules[{rule.index}]" for rule in load_policy(name).rules if not rule.dense]
    )
    if name in MODELS:
        known = MODELS[name].attention_share is not None
        assert all(("whole run" in column) == known for column in columns.values())


def test_a_policy_file(tmp_path: Path) -> None:
    def policy(name: str, *lines: str) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text("\n".join(["version: 1", *lines]))
        return str(path)

    two = policy("two", "rules:", "- {index: 0, window: [9, 4]}", "- window: 1/2")
    assert "give it one with --grid" in run(two, code=1)
    output = run(two, "--grid", "8,8")
    assert "rules[0]: axis 0: window 9 is larger than the grid's 8 tokens" in output
    assert figures(two, "--grid", "8,8")["rules[1]"]["window"] == "4x4"
    laid_out = policy("laid-out", "layout: {grid: [32, 32], prefix: 3}", "rules:", "- window: 8")
    assert figures(laid_out)["rules[0]"]["grid"] == "3 + 32x32"
    dense = policy("dense", "rules:", "- dense: true")
    assert "has no rule with a window" in run(dense, "--grid", "8,8", code=1)
    wrong = policy("wrong", "rules:", "- windw: 3")
    assert "did you mean 'window'?" in run(wrong, "--grid", "8,8", code=1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "nothing to simulate: give a case, a policy, or --grid with --window"),
        ("nonsense", "'nonsense' is neither a case (hunyuan-gna"),
        ("--grid 8,x --window 3,3", "--grid '8,x' must be 1 to 3 whole numbers"),
        ("--grid 8,8 --window 0,3", "--window '0,3' must be whole numbers of at least 1"),
        ("--grid 8,8 --window 9,3", "axis 0 of grid (8, 8): window 9 is larger than the grid's 8"),
        (
            "--grid 8,8 --window 3,3 --stride 1,4",
            "axis 1 of grid (8, 8): stride 4 must lie between",
        ),
        ("--grid 8,8 --window 3", "window has 1 entries for a grid of 2 axes (8, 8)"),
        ("--grid 8 --window 3 --causal 2", "--causal '2' must be 0 or 1 for each axis"),
        ("--grid 8 --window 3 --arch sm75", "'sm75'; there are sm90, sm100"),
        ("--grid 8 --window 3 --tiling odd", "--tiling 'odd' must be dynamic or static"),
        ("--grid 8 --window 3 --query-box 8", "--query-box and --key-box go together"),
        (
            "--grid 8 --window 3 --dense-steps 3",
            "--dense-steps '3' must be 2 whole numbers, like 15/50",
        ),
        ("--grid 8 --window 3 --attention-share 2", "attention_share 2.0 must lie between 0 and 1"),
        ("--grid 8 --window 3 --heads 0", "heads 0 must be at least 1"),
        ("--grid 600,600 --window 3,3 --flat 128,128", "enumerated up to 262144 only"),
        ("hunyuan-gna --window 3,3,3", "hunyuan-gna has its own window: leave them out"),
        ("hunyuan-gna --heads 3", "hunyuan-gna is a fixed case: leave out heads"),
        ("--grid 64,64 --search --window 3,3", "--search chooses window itself: leave out"),
        ("--grid 64,64 --search --flat 128,128", "--search has no use for --flat: leave out"),
        ("hunyuan-gna --arch cpu --plot x.png", "--arch cpu has no use for --plot: leave out"),
        ("--grid 64,64 --search --sparsity 2", "--sparsity 2 must lie between 0 and 1"),
        (
            "--grid 8,8 --window 3,3 --plot x.png --query 8,0",
            "--query (8, 0) is not a place on the grid",
        ),
        ("--grid 8,8 --window 3,3 --plot /no/x.png", "--plot /no/x.png:"),
        ("--grid 8,8 --window 3,3 --plot x.nope", "--plot x.nope:"),
    ],
)
def test_bad_input(args: str, message: str) -> None:
    assert message in run(*args.split(), code=1)


# Flattened tiles --------------------------------------------------------------------------------


@st.composite
def neighborhoods(draw: st.DrawFn) -> Neighborhood:
    rank = draw(st.integers(1, 3))
    sides = []
    for _ in range(rank):
        length = draw(st.integers(1, {1: 60, 2: 12, 3: 6}[rank]))
        dilation = draw(st.integers(1, min(length, 3)))
        window = draw(st.integers(1, length // dilation))
        stride = draw(st.integers(1, window))
        sides.append(Axis(length, window, stride, dilation, draw(st.booleans())))
    return Neighborhood(tuple(sides))


@given(neighborhoods(), st.integers(1, 20), st.integers(1, 20), st.booleans())
@settings(max_examples=200)
def test_flat_counts(neighborhood: Neighborhood, query: int, key: int, dynamic: bool) -> None:
    names = ("length", "window", "stride", "dilation", "causal")
    columns: Any = [[getattr(axis, name) for axis in neighborhood.axes] for name in names]
    see = oracle.mask(*columns).numpy()
    tokens = neighborhood.grid_tokens
    visited, full = [], []
    for start in range(0, tokens, query):
        rows = see[start : start + query]
        keys = np.flatnonzero(rows.any(axis=0))
        origin = int(keys[0]) if dynamic else 0
        tiles = sorted(set(((keys - origin) // key).tolist()))
        visited.append(len(tiles))
        spans = [range(origin + tile * key, origin + (tile + 1) * key) for tile in tiles]
        full.append(sum(span.stop <= tokens and bool(rows[:, list(span)].all()) for span in spans))
    found = flat_counts(neighborhood, query, key, "dynamic" if dynamic else "static")
    assert (found.query_tiles, found.visited.sum, found.visited.max) == (
        len(visited),
        sum(visited),
        max(visited),
    )
    assert (found.full.sum, found.full.max) == (sum(full), max(full))
    assert found.partial.sum == sum(visited) - sum(full)


@pytest.mark.parametrize("tiling", TILINGS)
def test_flattened_and_box_tiles_agree_on_one_axis(tiling: Tiling) -> None:
    workload = Workload(Neighborhood.of((3000,), (700,), (64,)))
    cut = plan_with(workload, (128,), (96,), tiling=tiling)
    assert flat_counts(workload.neighborhood, 128, 96, tiling) == cut.grid


def test_flattened_tiles_have_a_size_limit() -> None:
    with pytest.raises(GeometryError, match="up to 262144 only"):
        flat_counts(Neighborhood.of((MAX_TOKENS + 1,), (3,)), 128, 128)
    with pytest.raises(GeometryError, match="flattened key tile 0 must be at least 1"):
        flat_counts(Neighborhood.of((100,), (3,)), 128, 0)


# The front --------------------------------------------------------------------------------------


def test_search() -> None:
    assert_expected_inline(
        run("--grid", "64,64", "--search", "--sparsity", "0.8"),
        """\
 left out | window | stride | FLOP bound | predicted | block-sparse
 25.0%    | 48x64  | 4x1    | 1.33x      | 1.31x     | yes
 43.8%    | 48x48  | 8x16   | 1.78x      | 1.70x     | yes
 50.0%    | 32x64  | 4x1    | 2.00x      | 1.89x     | yes
 62.5%    | 24x64  | 2x1    | 2.67x      | 2.43x     | yes
 71.9%    | 24x48  | 8x16   | 3.56x      | 3.09x     | yes
 75.0%    | 16x64  | 2x1    | 4.00x      | 3.40x     | yes
 81.2%    | 16x48  | 8x16   | 5.33x      | 4.26x     | yes
 87.5%    | 8x64   | 2x1    | 8.00x      | 5.68x     | yes
 90.6%    | 8x48   | 8x16   | 10.67x     | 6.82x     | yes
 93.8%    | 8x32   | 8x16   | 16.00x     | 8.53x     | yes
 96.9%    | 8x16   | 8x16   | 32.00x     | 11.39x    | yes

The fastest rule that leaves out at most 80%:

  - window: [16, full]
    stride: [2, 1]""",
    )


def test_the_printed_rule_can_be_pasted(tmp_path: Path) -> None:
    output = CliRunner().invoke(app, ["simulate", "flux-4k", "--search"]).output
    rule = output[output.index("  - window:") :]
    path = tmp_path / "found.yaml"
    path.write_text(f"version: 1\nrules:\n{rule}")
    window, stride, _, _ = load_policy(path).rules[0].parameters((256, 256))
    share = Neighborhood.of((256, 256), window, stride, prefix=512).flop_share
    assert 0.8 < 1 - share <= 0.9


def test_nothing_beats_the_front() -> None:
    workload = Workload(Neighborhood.of((16, 44, 80), (16, 44, 80)), 8)
    front = pareto_front(workload, "sm90")
    assert len(front) > 10
    for before, after in itertools.pairwise(front):
        assert before.sparsity < after.sparsity and before.speedup < after.speedup
    for windows in ((12, 32, 56), (8, 16, 24), (16, 16, 40), (4, 44, 8)):
        for strides in ((1, 1, 1), (2, 4, 8), (4, 4, 4), (1, 8, 8)):
            neighborhood = Neighborhood.of((16, 44, 80), windows, strides)
            found = speedups(plan(Workload(neighborhood, 8), "sm90")).predicted
            denser = [p for p in front if p.sparsity <= 1 - neighborhood.flop_share + 1e-9]
            assert found <= max(p.speedup for p in denser) * 1.02
    best = recommended(front, 0.9)
    assert best is not None and best.speedup == max(p.speedup for p in front if p.sparsity <= 0.9)
    assert recommended(front, 0.01) is None


def test_rule_text_says_full() -> None:
    workload = Workload(Neighborhood.of((16, 44, 80), (16, 24, 16), (1, 8, 16)))
    text = rule_text(Point(plan(workload), 0.9, 9.0))
    assert text == "  - window: [full, 24, 16]\n    stride: [1, 8, 16]"


# The picture ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["flux4k-na", "hunyuan-58", "1d-32k", "dilated"])
def test_plot(case: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.svg"
    run(case, "--plot", str(path))
    assert path.read_text().rstrip().endswith("</svg>")


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    output = run("flux4k-na", "--plot", str(tmp_path / "out.png"), code=1)
    assert "needs matplotlib: pip install 'gna-compile[plot]'" in output


def test_the_tiles_of_the_picture_are_those_of_the_plan() -> None:
    for tiling in TILINGS:
        axis = Axis(100, 30, 7, 2)
        rows = []
        for group in range(2):
            for start in range(0, 50, 8):
                tiles = key_tiles(axis, group + 2 * start, 8, 4, tiling)
                rows.append((len(tiles), sum(inner for _, _, inner in tiles)))
        cut: Plan = plan_with(Workload(Neighborhood((axis,))), (8,), (4,), tiling=tiling)
        assert sum(v for v, _ in rows) == cut.grid.visited.sum
        assert sum(i for _, i in rows) == cut.grid.full.sum
