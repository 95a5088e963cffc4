"""Real model classes through the backend: which sites are rewritten, and the numbers.

The reference is the same model in eager mode with the brute-force mask given to SDPA. The tables
are in `tests/golden`; `UPDATE_GOLDEN=1 pytest` writes them anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_model import masked
from model_masks import POLICY, masks_of
from models import (
    MODELS,
    TRUE_LAYOUTS,
    Built,
    build,
    inputs_for,
    main_output,
)
from torch._dynamo.backends.registry import lookup_backend

import gna_compile
from benchmarks.tables import PAGES, ROOT, with_tables
from gna_compile.backend import gna
from gna_compile.report.explain import Explanation

GOLDEN = Path(__file__).parents[1] / "golden"
NOT_SELF = ("cross-attention", "opaque-attention")
REWRITTEN = [
    name
    for name in MODELS
    if "mochi" not in name and "| gna " in (GOLDEN / f"{name}.decisions.txt").read_text()
]


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.is_file(), f"{path} is missing: run with UPDATE_GOLDEN=1 and look at it"
    assert text == path.read_text()


def table_text(explanation: Explanation) -> str:
    lines = []
    for row in explanation.rows:
        became = f"gna {row.window} / {row.stride}" if row.decision == "gna" else row.reason
        layout = f"{row.layout} ({row.layout_source})" if row.layout else "-"
        shape = f"{row.heads}x{row.tokens}x{row.head_dim}"
        lines.append(f"{row.layer or '?':52} | {row.form:11} | {shape:8} | {layout:31} | {became}")
    return "\n".join(lines) + "\n"


def compiled(built: Built, policy: Any = POLICY, **options: Any) -> Any:
    return torch.compile(
        built.model, backend="gna", options={"policy": policy, "inner": "aot_eager", **options}
    )


@pytest.mark.parametrize("name", list(MODELS))
def test_decisions(name: str) -> None:
    built = build(name)
    explanation = gna_compile.explain(built.model, policy=POLICY, quiet=True, **built.inputs)
    assert explanation.rows
    own = [row for row in explanation.rows if row.reason not in NOT_SELF]
    true = TRUE_LAYOUTS[name]
    for i, row in enumerate(own):
        if row.decision == "gna":
            assert len(own) == len(true), "which site is which?"
            assert row.layout == true[i]
    title = f"{type(built.model).__name__} ({name}, {MODELS[name].library})\n"
    golden(f"{name}.decisions.txt", title + table_text(explanation))


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_readme_and_docs_are_current(page: str) -> None:
    assert with_tables(page) == (ROOT / page).read_text(), "run benchmarks/tables.py"


@pytest.mark.parametrize("name", REWRITTEN)
def test_numbers(name: str) -> None:
    built = build(name)
    explanation = gna_compile.explain(built.model, policy=POLICY, quiet=True, **built.inputs)
    masks = masks_of(explanation, built.model)
    dense = built.run()
    with masked(built.model, masks):
        expected = built.run()
    if masks:
        assert not torch.allclose(dense, expected, rtol=1e-3, atol=1e-3)
    actual = built.run(compiled(built))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "flux", "vit"])
def test_numbers_under_inductor(name: str) -> None:
    built = build(name, batch=2)
    with masked(
        built.model,
        masks_of(gna_compile.explain(built.model, policy=POLICY, quiet=True, **built.inputs)),
    ):
        expected = built.run()
    actual = built.run(compiled(built, inner="inductor"))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "timm-vit"])
def test_unfused_attention(name: str) -> None:
    fused, written = build(name), build(name, written_out=True)
    explanation = gna_compile.explain(written.model, policy=POLICY, quiet=True, **written.inputs)
    assert {row.form for row in explanation.rows} == {"unfused"}
    assert {row.decision for row in explanation.rows} == {"gna"}
    with masked(fused.model, masks_of(explanation)):
        expected = fused.run()
    torch.testing.assert_close(written.run(compiled(written)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    # Dense `aot_eager` and `inductor` give wrong results for Cosmos with dynamic=True (torch 2.13).
    [("wan", True), ("sd3", True), ("cosmos", None)],
)
def test_one_graph_serves_the_resolutions_that_it_serves_dense(
    name: str, dynamic: bool | None
) -> None:
    """As many graphs as without us, and the right numbers on each grid."""
    built = build(name)
    two_dimensional = [(8, 10), (12, 10), (10, 14), (14, 8)]
    grids = (
        [(5, 6, 8), (7, 6, 10), (5, 10, 12), (7, 8, 6)] if len(built.grid) == 3 else two_dimensional
    )

    def graphs(backend: Any, policy: Any) -> int:
        torch._dynamo.reset()
        compiled = 0

        def counting(gm: Any, inputs: Any) -> Any:
            nonlocal compiled
            run = backend(gm, inputs)  # raises where Dynamo has to start again
            compiled += 1
            return run

        run = torch.compile(built.model, backend=counting, dynamic=dynamic)
        for grid in grids:
            inputs = inputs_for(name, grid)
            with torch.no_grad():
                actual = main_output(run(**inputs))
                with masked(built.model, masks_of(explained(inputs)) if policy else {}):
                    expected = main_output(built.model(**inputs))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        return compiled

    def explained(inputs: Any) -> Explanation:
        return gna_compile.explain(built.model, policy=POLICY, quiet=True, **inputs)

    options = {"policy": POLICY, "inner": "aot_eager"}
    ours = graphs(lambda gm, inputs: gna(gm, inputs, options=options), POLICY)
    dense = graphs(lookup_backend("aot_eager"), None)
    assert ours == dense
    assert ours < len(grids)


@pytest.mark.parametrize("name", ["wan", "flux", "hunyuan-video"])
def test_graph_diff(name: str) -> None:
    built = build(name)
    diff = gna_compile.graph_diff(built.model, policy=POLICY, **built.inputs)
    assert "gna.attention.v2" in diff
    golden(f"{name}.diff", diff + "\n")
