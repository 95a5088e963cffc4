"""The backend as a user meets it: options, guards, phases, prepare, training, caches."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
from masked_model import masked
from models import build, flux_ids, main_output
from small_net import GRID, PHASED, Attention, Block, Net, image, policy
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gna_compile
from gna_compile import backend, lower
from gna_compile.backend import gna
from gna_compile.graph.tokens import position_ids
from gna_compile.graph.tokens.position_ids import pieces_of
from gna_compile.options import OptionsError
from gna_compile.prepared.annotations import annotation_of


def run_masked(
    model: nn.Module,
    x: Tensor,
    window: tuple[int, int] = (3, 3),
    grid: tuple[int, int] = GRID,
    layers: str = "*",
) -> Tensor:
    if isinstance(model, Net):
        model = copy.copy(model)
        model.checkpoint = False  # a checkpoint would run again in the backward, without the mask
    with masked(model, {layers: oracle.mask(grid, window)}):
        return model(x)


def compiled(model: Any, the_policy: Any, inner: str = "aot_eager", **kwargs: Any) -> Any:
    return torch.compile(
        model, backend="gna", options={"policy": the_policy, "inner": inner}, **kwargs
    )


def test_works_without_importing_the_package(tmp_path: Path) -> None:
    script = """
import sys, torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
class M(torch.nn.Module):
    def forward(self, x):
        x = x.flatten(2).transpose(1, 2).unsqueeze(1)
        return sdpa(x, x, x)
assert not any(name.startswith("gna_compile") for name in sys.modules)
policy = {"version": 1, "min_tokens": 0, "min_speedup": 0, "rules": [{"window": 3}]}
m = M()
out = torch.compile(m, backend="gna", options={"policy": policy, "inner": "eager"})(torch.randn(1, 8, 6, 8))
assert "gna_compile.ops" in sys.modules
print("ok", tuple(out.shape))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout.strip() == "ok (1, 1, 48, 8)", result.stderr


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_training(dynamic: bool, checkpoint: bool) -> None:
    model = Net(checkpoint=checkpoint)
    run = compiled(model, policy(), dynamic=dynamic, fullgraph=True)
    for grid in ((6, 8), (8, 10)):
        x = image(grid)
        expected = run_masked(model, x, grid=grid)
        actual = run(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        seed = torch.randn_like(actual)
        ours = torch.autograd.grad(actual, list(model.parameters()), seed)
        theirs = torch.autograd.grad(expected, list(model.parameters()), seed)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_autocast_gives_the_dtype_that_dense_attention_gives() -> None:
    model, x = Net(), image()
    with torch.autocast("cpu", torch.bfloat16):
        dense, actual = model(x), compiled(model, policy())(x)
        expected = run_masked(model, x)
    assert actual.dtype == dense.dtype
    torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference(context: Any) -> None:
    model, x = Net(), image()
    with context():
        torch.testing.assert_close(
            compiled(model, policy())(x), run_masked(model, x), rtol=1e-4, atol=1e-5
        )


def test_first_matching_rule_wins_by_layer() -> None:
    model, x = Net(), image()
    rules = policy({"layers": "blocks.1", "dense": True}, {"window": 3})
    expected = run_masked(model, x, layers="blocks.0.attn")
    torch.testing.assert_close(compiled(model, rules)(x), expected, rtol=1e-4, atol=1e-5)
    rows = gna_compile.explain(model, x, policy=rules, quiet=True).rows
    assert [row.reason for row in rows] == ["", "rule-dense"]


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (policy({"layers": "nothing.*", "window": 3}), "no-rule"),
        (policy({"dense": True}), "rule-dense"),
        (policy(min_tokens=49), "too-few-tokens"),
        (policy({"window": 7}), "window-exceeds-grid"),
        (policy({"window": "full"}), "window-covers-grid"),
        (policy({"window": [3, 3, 3]}), "layout-mismatch"),
        (policy({"window": [5, 7]}, min_speedup=3.0), "predicted-slowdown"),
        (policy({"window": 3}, layout={"grid": [8, 6]}), "layout-mismatch"),
        (policy({"window": 3}, layout={"grid": [5, 7]}), "layout-mismatch"),
    ],
)
def test_declined_sites_are_dense_with_a_reason(rules: dict[str, Any], reason: str) -> None:
    model, x = Net(), image()
    rows = gna_compile.explain(model, x, policy=rules, quiet=True).rows
    assert {row.reason for row in rows} == {reason}
    assert torch.equal(compiled(model, rules)(x), torch.compile(model, backend="aot_eager")(x))


def test_nothing_rewritten_gives_inductors_own_code() -> None:
    from torch._inductor.utils import run_and_get_code

    model, x = Net(), image()
    with torch.no_grad():
        expected, theirs = run_and_get_code(torch.compile(model, backend="inductor"), x)
        torch._dynamo.reset()
        run = compiled(model, policy({"dense": True}), inner="inductor")
        actual, ours = run_and_get_code(run, x)
    assert torch.equal(actual, expected)
    assert [strip_paths(code) for code in ours] == [strip_paths(code) for code in theirs]


def strip_paths(code: str) -> list[str]:
    return [
        line for line in code.splitlines() if "AOT ID" not in line and "kernel path" not in line
    ]


def test_dense_sites_beside_rewritten_ones_stay_as_they_were() -> None:
    model, x = Net(), image()
    diff = gna_compile.graph_diff(model, x, policy=policy({"layers": "blocks.0", "window": 3}))
    assert diff.count("-") and diff.count("gna.attention.v2") == 1
    removed = [line for line in diff.splitlines() if line.startswith("-")]
    assert sum("= scaled_dot_product_attention(" in line for line in removed) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polcy": "x"}, "did you mean 'policy'"),
        ({"policy": policy(), "max_autotune": True}, "under 'inductor'"),
        ({"policy": policy(), "inner": 3}, "'inner'"),
        ({"policy": policy(), "inner": "eager", "mode": "reduce-overhead"}, "Inductor's"),
        ({"policy": policy(), "verify_masks": 1}, "'verify_masks'"),
    ],
)
def test_bad_options_teach(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        gna(torch.fx.symbolic_trace(nn.Identity()), [], options=options)


def test_what_later_versions_hand_to_every_backend_is_taken() -> None:
    """`name` is from torch 2.15; a backend that raises on what it does not know ages badly."""
    model, x = Net(), image()
    options = {"policy": policy(), "inner": "eager"}
    named = {"name": "net"} if "name" in inspect.signature(torch.compile).parameters else {}
    out = torch.compile(model, backend="gna", options=options, **named)(x)  # type: ignore[call-overload]
    torch._dynamo.reset()
    later = partial(gna, options=options, name="net", not_yet_invented=True)
    assert torch.equal(out, torch.compile(model, backend=later)(x))
    with pytest.raises(OptionsError, match="unknown option 'name'"):
        gna(torch.fx.symbolic_trace(nn.Identity()), [], options={"name": "net"}, name="net")


def test_without_a_policy_it_warns_and_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Net(), image()
    with caplog.at_level(logging.WARNING, "gna_compile"):
        out = torch.compile(model, backend="gna", options={"inner": "aot_eager"})(x)
    assert "no policy" in caplog.text
    assert torch.equal(out, torch.compile(model, backend="aot_eager")(x))


def test_mode_and_inductor_options_reach_inductor() -> None:
    model, x = Net(), image()
    options: dict[str, Any] = {
        "policy": policy(),
        "mode": "reduce-overhead",
        "inductor": {"max_autotune": False},
    }
    with torch.no_grad():
        out = torch.compile(model, backend="gna", options=options)(x)
        torch.testing.assert_close(out, run_masked(model, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match="no_such_option"):
        bad: dict[str, Any] = {"policy": policy(), "inductor": {"no_such_option": 1}}
        torch.compile(Net(), backend="gna", options=bad)(x)


def test_phases_switch_without_recompiling() -> None:
    model, x = Net(), image()
    run = compiled(model, PHASED)
    sparse, dense = run_masked(model, x), model(x)
    torch.testing.assert_close(run(x), sparse, rtol=1e-4, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        with gna_compile.phase("warmup"):
            torch.testing.assert_close(run(x), dense, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run(x), sparse, rtol=1e-4, atol=1e-5)
    with gna_compile.phase("warm-up"), pytest.raises(ValueError, match="'warmup'"):
        run(x)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_phase_is_lowered_when_it_first_runs(context: Any, dynamic: bool) -> None:
    """Symbolic sizes need Dynamo's tracing, so there all phases are lowered at once."""
    model, x = Net(), image()
    sparse, dense = run_masked(model, x), model(x)
    with mock.patch.object(backend, "lower", wraps=lower.lower) as calls, context():
        run = compiled(model, PHASED, inner="inductor", dynamic=dynamic, fullgraph=True)
        with gna_compile.phase("warmup"):
            torch.testing.assert_close(run(x), dense, rtol=1e-4, atol=1e-5)
            at_first = calls.call_count
            torch.manual_seed(7)
            torch.testing.assert_close(run(x), dense, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run(x), sparse, rtol=1e-4, atol=1e-5)
        drawn = torch.rand(3)
        run(x)
        added = calls.call_count - at_first
    if dynamic:
        assert at_first >= 2 and added == 0
    else:
        assert at_first == added == 1
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))


def test_a_phase_that_has_not_run_yet_keeps_no_inputs_alive() -> None:
    model = Net()
    run = compiled(model, PHASED)
    x = image()
    gone = weakref.ref(x)
    with torch.no_grad():
        run(x)
    del x
    gc.collect()
    assert gone() is None


def test_parameters_stay_what_they_are_to_the_inner_compiler() -> None:
    """Else it would take them for inputs that change, and CUDA graphs would copy all of them."""
    model, x = Net(), image()
    graphs = []

    def seen(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    with mock.patch.object(backend, "lower", seen):
        run = compiled(model, PHASED)
        run(x)
        with gna_compile.phase("warmup"):
            run(x)
    assert len(graphs) == 2
    for gm in graphs:
        assert hasattr(gm, "_param_name_to_source")
        sources = [node._dynamo_source.name for node in gm.graph.find_nodes(op="placeholder")]
        assert len(set(map(str, sources))) == len(list(model.parameters())) + 1


def test_a_phase_belongs_to_its_thread() -> None:
    model, x = Net(), image()
    run = compiled(model, PHASED)
    expected = {"default": run(x)}
    with gna_compile.phase("warmup"):
        expected["warmup"] = run(x)
    results: dict[str, Tensor] = {}
    ready = threading.Barrier(2)

    def work(name: str) -> None:
        gna_compile.set_phase(name)
        ready.wait()
        results[name] = run(x)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gna_compile.current_phase() == "default"
    for name, result in expected.items():
        torch.testing.assert_close(results[name], result)


def test_phase_schedule_follows_the_policy() -> None:
    phased = policy(
        {"phases": "warmup", "dense": True}, {"window": 3}, phases={"warmup": {"first": 2, "of": 5}}
    )
    seen = []
    with gna_compile.phase("default"):
        schedule = gna_compile.PhaseSchedule(phased, steps=5)
        for _run in range(2):
            for step in range(5):
                seen.append(gna_compile.current_phase())
                assert schedule(None, step, None, {"latents": 1}) == {"latents": 1}
    assert seen == ["warmup", "warmup", "default", "default", "default"] * 2


def compile_blocks(model: Net) -> list[int]:
    compiled_graphs = []

    def counting(gm: Any, inputs: Any) -> Any:
        compiled_graphs.append(1)
        return gna(gm, inputs, options={"inner": "aot_eager"})

    for block in model.blocks:
        block.compile(backend=counting, fullgraph=True)
    return compiled_graphs


def test_regional_compilation_by_rule() -> None:
    model, x = Net(depth=4), image()
    layers = policy({"index": "0-1", "window": 3}, {"dense": True})
    expected = run_masked(model, x, layers="blocks.[01].attn")
    gna_compile.prepare(model, layers, layout={"grid": list(GRID)})
    graphs = compile_blocks(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2, "layers with one rule share a graph, others have their own"
    gna_compile.prepare(model, policy(), layout={"grid": list(GRID)})
    torch.testing.assert_close(model(x), run_eager(model, x), rtol=1e-4, atol=1e-5)


def run_eager(model: Net, x: Tensor) -> Tensor:
    twin = Net(depth=len(model.blocks))
    twin.load_state_dict(model.state_dict())
    return run_masked(twin, x)


def test_an_attention_module_compiled_by_itself_is_guarded() -> None:
    first, second = Attention(), Attention()
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 48, 32)
    gna_compile.prepare(first, policy(), layout={"grid": list(GRID)})
    gna_compile.prepare(second, policy({"dense": True}), layout={"grid": list(GRID)})
    for module in (first, second):
        module.compile(backend="gna", options={"inner": "aot_eager"})
    dense = second(x)
    assert not torch.allclose(first(x), dense)
    gna_compile.prepare(first, policy({"dense": True}), layout={"grid": list(GRID)})
    torch.testing.assert_close(first(x), dense)


def test_prepare_survives_copies_and_can_be_undone() -> None:
    model = Net()
    before = list(model.state_dict())
    gna_compile.prepare(model, policy())
    assert list(model.state_dict()) == before
    assert annotation_of(model.get_submodule("blocks.1.attn")) is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        annotation = annotation_of(twin.get_submodule("blocks.1.attn"))
        assert annotation is not None
        assert annotation.name == "blocks.1.attn"
        x = image()
        out = torch.compile(twin, backend="gna", options={"inner": "aot_eager"}, fullgraph=True)(x)
        torch.testing.assert_close(out, run_eager(model, x), rtol=1e-4, atol=1e-5)
    gna_compile.unprepare(model)
    assert all(annotation_of(module) is None for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_prepare_warns_of_the_recompile_limit(caplog: pytest.LogCaptureFixture) -> None:
    rules = [
        {"index": i, "window": 3, "stride": 1 + i % 3, "dilation": 1 + i // 3} for i in range(9)
    ]
    with caplog.at_level(logging.WARNING, "gna_compile"):
        gna_compile.prepare(Net(depth=9), policy(*rules))
    assert "recompile_limit" in caplog.text


def flux_inputs(grid: tuple[int, int]) -> dict[str, Any]:
    inputs = dict(build("flux").inputs)
    channels = inputs["hidden_states"].shape[-1]
    seeded = torch.Generator().manual_seed(0)
    inputs["hidden_states"] = torch.randn(1, grid[0] * grid[1], channels, generator=seeded)
    return inputs | {"img_ids": flux_ids(grid)}


def flux_masked(model: nn.Module, inputs: dict[str, Any], grid: tuple[int, int]) -> Tensor:
    text = inputs["encoder_hidden_states"].shape[1]
    with torch.no_grad(), masked(model, {"*": oracle.mask(grid, (3, 3), prefix=text)}):
        return main_output(model(**inputs))


@pytest.mark.parametrize("regional", [False, True])
def test_packed_latents_follow_the_aspect_ratio(regional: bool) -> None:
    model: Any = build("flux").model
    grids = [(8, 10), (10, 8), (4, 20), (8, 10)]
    expected = [flux_masked(model, flux_inputs(grid), grid) for grid in grids]
    gna_compile.prepare(model, policy())
    run: Any = model
    if regional:
        model.compile_repeated_blocks(backend="gna", options={"inner": "aot_eager"}, fullgraph=True)
    else:
        run = torch.compile(model, backend="gna", options={"inner": "aot_eager"}, fullgraph=True)
    for grid, wanted in zip(grids, expected, strict=True):
        with torch.no_grad():
            actual = main_output(run(**flux_inputs(grid)))
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def assert_sparse(run: Any, plain: nn.Module, inputs: Any, grid: tuple[int, int]) -> None:
    """As the model that was never prepared, under the mask of this grid."""
    with torch.no_grad():
        actual = main_output(run(**inputs))
    expected = flux_masked(plain, inputs, grid)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def compile_flux(model: Any, regional: bool, **kwargs: Any) -> Any:
    options: dict[str, Any] = {"inner": "aot_eager"}
    if not regional:
        return torch.compile(model, backend="gna", options=options, **kwargs)
    model.compile_repeated_blocks(backend="gna", options=options, **kwargs)
    return model


@pytest.mark.parametrize("regional", [False, True])
def test_packed_latents_of_many_grids_compile_no_more_than_dense_ones(regional: bool) -> None:
    """The grid becomes an input of the graph when the number of tokens does."""
    grids = [(8, 10), (12, 6), (6, 12), (10, 8), (5, 9), (7, 7), (16, 4), (4, 16), (9, 12), (8, 10)]
    counts: dict[str, list[int]] = {}
    for name in ("aot_eager", "gna"):
        torch._dynamo.reset()
        counters.clear()
        model: Any = build("flux").model
        plain = copy.deepcopy(model)
        if name == "gna":
            gna_compile.prepare(model, policy())
            run = compile_flux(model, regional)
        elif regional:
            run = model
            model.compile_repeated_blocks(backend=name)
        else:
            run = torch.compile(model, backend=name)
        counts[name] = []
        for grid in grids:
            inputs = flux_inputs(grid)
            with torch.no_grad():
                actual = main_output(run(**inputs))
            if name == "gna":
                expected = flux_masked(plain, inputs, grid)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            counts[name].append(counters["stats"]["unique_graphs"])
    assert counts["gna"] == counts["aot_eager"]
    assert counts["gna"][1] == counts["gna"][-1]


@pytest.mark.parametrize("regional", [False, True])
def test_packed_latents_of_as_many_tokens_differ_in_their_grid(regional: bool) -> None:
    """The number of tokens stays a constant; then the grid's sizes are held to it."""
    model: Any = build("flux").model
    plain = copy.deepcopy(model)
    run = compile_flux(gna_compile.prepare(model, policy()), regional, fullgraph=True)
    torch._dynamo.reset()
    counters.clear()
    counts = []
    for grid in ((8, 10), (10, 8), (4, 20), (20, 4), (5, 16)):
        assert_sparse(run, plain, flux_inputs(grid), grid)
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[1:] == [counts[1]] * 4


def test_packed_latents_under_dynamic_compile_once() -> None:
    model: Any = build("flux").model
    plain = copy.deepcopy(model)
    run = compile_flux(gna_compile.prepare(model, policy()), False, dynamic=True)
    for grid in ((8, 10), (6, 12), (10, 8)):
        inputs = flux_inputs(grid)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=grid != (8, 10)):
            actual = main_output(run(**inputs))
        expected = flux_masked(plain, inputs, grid)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_prepared_model_has_a_grid_of_its_own() -> None:
    model: Any = build("flux").model
    plain = copy.deepcopy(model)
    gna_compile.prepare(model, policy())
    first, second = flux_inputs((8, 10)), flux_inputs((10, 8))
    model(**first)
    twin = copy.deepcopy(model)
    runs = [
        (compile_flux(model, False), first, (8, 10)),
        (compile_flux(twin, False), second, (10, 8)),
    ]
    for run, inputs, grid in runs * 2:
        assert_sparse(run, plain, inputs, grid)


def test_packed_latents_in_attention_that_is_compiled_by_itself() -> None:
    """Its own hooks are traced apart, so there a guard holds the graph to the grid."""
    model: Any = build("flux").model
    plain = copy.deepcopy(model)
    gna_compile.prepare(model, policy(global_tokens="prefix"))
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.compile(backend="gna", options={"inner": "aot_eager"})
    for grid in ((8, 10), (10, 8), (8, 10), (6, 12)):
        assert_sparse(model, plain, flux_inputs(grid), grid)


def test_packed_latents_inside_a_larger_graph_are_checked(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing reads the ids before the graph there: a new grid runs dense once, and then sparse."""
    model: Any = build("flux").model
    plain = copy.deepcopy(model)
    pipe = gna_compile.prepare(Pipe(model), policy())
    run = compiled(pipe, None)
    for grid in ((8, 10), (10, 8), (6, 12), (12, 6), (4, 20)):
        inputs = flux_inputs(grid)
        outcomes = []
        for _ in range(3):
            with torch.no_grad():
                actual = main_output(run(**inputs))
                dense = main_output(plain(**inputs))
            sparse = flux_masked(plain, inputs, grid)
            distances = [(actual - wanted).abs().max() for wanted in (dense, sparse)]
            assert min(distances) < 1e-4
            outcomes.append(distances[1] < 1e-4)
        assert outcomes[1:] == [True, True], grid
    assert "the next call uses the grid of the ids" in caplog.text


def test_two_grids_of_packed_latents_in_one_graph() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left: Any = build("flux").model
            self.right: Any = build("flux").model

        def forward(self, left: Any, right: Any) -> Any:
            return main_output(self.left(**left)), main_output(self.right(**right))

    model = Two()
    plain = copy.deepcopy(model)
    gna_compile.prepare(model, policy())
    grids = (8, 10), (10, 8)
    left, right = map(flux_inputs, grids)
    with torch.no_grad():
        model(left, right)
        outputs = compiled(model, None)(left, right)
    for output, twin, inputs, grid in zip(
        outputs, (plain.left, plain.right), (left, right), grids, strict=True
    ):
        expected = flux_masked(twin, inputs, grid)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


class Renamed(nn.Module):
    """Inlines the transformer in a graph whose inputs do not look like position ids."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, positions: Tensor, **inputs: Any) -> Any:
        return self.transformer(img_ids=positions, **inputs)


def test_a_grid_seen_before_is_not_trusted_where_position_ids_are_out_of_sight() -> None:
    model: Any = build("flux").model
    plain = copy.deepcopy(model)
    pipe = Renamed(gna_compile.prepare(model, policy()))
    model(**flux_inputs((8, 10)))
    run = compiled(pipe, None)
    for grid in ((8, 10), (10, 8)):
        inputs = flux_inputs(grid)
        expected = main_output(plain(**inputs))
        positions = inputs.pop("img_ids")
        with torch.no_grad():
            actual = main_output(run(positions=positions, **inputs))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sharing", ["shallow copy", "same layers", "larger graph"])
def test_ids_that_were_seen_before_count_again_at_each_call(sharing: str) -> None:
    """Something else may have run the same layers on another grid in between."""
    model: Any = build("flux").model
    plain = copy.deepcopy(model)
    other: Any
    if sharing == "same layers":
        other = copy.deepcopy(model)
        for name in ("transformer_blocks", "single_transformer_blocks"):
            setattr(other, name, getattr(model, name))
        gna_compile.prepare(nn.ModuleList([model, other]), policy())
    else:
        gna_compile.prepare(model, policy())
        other = copy.copy(model) if sharing == "shallow copy" else compiled(Pipe(model), None)
    compile_flux(model, regional=True)
    first, second = flux_inputs((8, 10)), flux_inputs((10, 8))
    expected = flux_masked(plain, first, (8, 10))
    for _ in range(3):
        with torch.no_grad():
            actual = main_output(model(**first))
            other(**second)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class Checkpointed(nn.Module):
    """Its attention is in a subgraph that its sizes do not enter by themselves."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
            attend = F.scaled_dot_product_attention
            output: Tensor = checkpoint(attend, heads, heads, heads, use_reentrant=False)
            return output.transpose(1, 2).flatten(2)

    def __init__(self) -> None:
        super().__init__()
        self.position, self.attn = nn.Linear(3, 32), self.Attention()

    def forward(self, x: Tensor, img_ids: Tensor) -> Tensor:
        y: Tensor = self.attn(x + self.position(img_ids))
        return y


def test_packed_latents_in_a_subgraph_of_their_own() -> None:
    torch.manual_seed(0)
    model = Checkpointed()
    run = torch.compile(
        gna_compile.prepare(model, policy()), backend="gna", options={"inner": "aot_eager"}
    )
    for grid in ((8, 10), (12, 6), (6, 12)):
        x, ids = torch.randn(1, grid[0] * grid[1], 32), flux_ids(grid)
        y = (x + model.position(ids)).unflatten(-1, (2, -1)).transpose(1, 2)
        mask = oracle.mask(grid, (3, 3))
        expected = F.scaled_dot_product_attention(y, y, y, attn_mask=mask)
        actual = run(x, ids)
        torch.testing.assert_close(
            actual, expected.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_backends_run_a_prepared_model_as_it_is(backend: str) -> None:
    model: Any = build("flux").model
    gna_compile.prepare(model, policy())
    for grid in ((8, 10), (6, 12)):
        inputs = flux_inputs(grid)
        with torch.no_grad():
            expected = main_output(model(**inputs))
            actual = main_output(torch.compile(model, backend=backend)(**inputs))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [None, {"grid": [8, 10]}])
def test_packed_latents_without_prepare_run_dense_on_another_grid(
    layout: Any, caplog: pytest.LogCaptureFixture
) -> None:
    built = build("flux")
    top = {"layout": layout} if layout else {}
    run = compiled(built.model, policy(**top), fullgraph=True)
    same, other = flux_inputs((8, 10)), flux_inputs((10, 8))
    with torch.no_grad():
        torch.testing.assert_close(
            main_output(run(**same)), flux_masked(built.model, same, (8, 10)), rtol=1e-4, atol=1e-4
        )
        with caplog.at_level(logging.WARNING, "gna_compile"):
            actual = main_output(run(**other))
        torch.testing.assert_close(actual, main_output(built.model(**other)), rtol=1e-4, atol=1e-4)
    assert "using dense attention" in caplog.text


def test_verify_masks_catches_a_mask_that_hides_the_grid() -> None:
    class Masked(nn.Module):
        def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            x = torch.cat([image.flatten(2).transpose(1, 2), text], 1).unsqueeze(1)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    image, text = torch.randn(1, 8, *GRID), torch.randn(1, 4, 8)
    mask = torch.ones(1, 1, 1, 52, dtype=torch.bool)
    mask[..., -2:] = False
    options: dict[str, Any] = {
        "policy": policy(key_mask="global_tokens"),
        "inner": "aot_eager",
        "verify_masks": True,
    }
    run = torch.compile(Masked(), backend="gna", options=options)
    assert run(image, text, mask).isfinite().all()
    mask[..., 3] = False
    with pytest.raises(RuntimeError, match="hides tokens of the grid"):
        run(image, text, mask)


CACHE_SCRIPT = """
import sys, torch
from torch._dynamo.utils import counters
sys.path[:0] = [{tests!r}]
from small_net import Net, policy
torch.manual_seed(0)
model = Net()
x = torch.randn(1, 3, 12, 16)
with torch.no_grad():
    out = torch.compile(model, backend="gna", options={{"policy": policy({rule})}})(x)
hits = counters["aot_autograd"]["autograd_cache_hit"]
print(hits, f"{{out.double().abs().sum().item():.6f}}")
"""


def test_caches_tell_policies_and_layers_apart(tmp_path: Path) -> None:
    def run(rule: str) -> tuple[int, float]:
        script = CACHE_SCRIPT.format(tests=str(Path(__file__).parents[1] / "support"), rule=rule)
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        out = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=env
        )
        assert out.returncode == 0, out.stderr
        hits, total = out.stdout.split()[-2:]
        return int(hits), float(total)

    cold, total = run('{"window": 3}')
    warm, again = run('{"window": 3}')
    assert (cold, warm) == (0, 1)
    assert again == total
    missed, other = run('{"window": 5}')
    assert missed == 0
    assert other != total
    first, a = run('{"layers": "blocks.0", "window": 3}, {"dense": True}')
    second, b = run('{"layers": "blocks.1", "window": 3}, {"dense": True}')
    assert (first, second) == (0, 0)
    assert a != b


class SharedBlock(Block):
    """Dynamo keeps one subgraph for all blocks of this class."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("alike", [False, True])
def test_a_shared_subgraph_is_rewritten_only_for_layers_that_are_alike(
    prepared: bool, alike: bool
) -> None:
    model, x = Net(), image()
    model.blocks = nn.ModuleList(SharedBlock() for _ in range(2))
    rules: Any = policy({"window": 3}) if alike else policy({"layers": "blocks.0", "window": 3})
    expected = run_masked(model, x) if alike else model(x)
    if prepared:
        gna_compile.prepare(model, rules)
        rules = None
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, rules)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("regional", [False, True])
def test_a_declared_grid_is_not_trusted_where_position_ids_are_out_of_sight(regional: bool) -> None:
    built = build("flux")
    model: Any = built.model
    options: Any = {"policy": policy(layout={"grid": [8, 10]}), "inner": "aot_eager"}
    run = model
    if regional:
        model.compile_repeated_blocks(backend="gna", options=options)
    else:

        def broken(module: nn.Module, args: Any, output: Any) -> None:
            torch._dynamo.graph_break()

        model.pos_embed.register_forward_hook(broken)
        run = torch.compile(model, backend="gna", options=options)
    for grid in ((8, 10), (10, 8)):
        inputs = flux_inputs(grid)
        with torch.no_grad():
            expected = main_output(build("flux").model(**inputs))
            torch.testing.assert_close(main_output(run(**inputs)), expected, rtol=1e-4, atol=1e-4)


def test_a_declared_grid_is_not_trusted_if_position_ids_show_none() -> None:
    built = build("flux")
    run = compiled(built.model, policy(layout={"grid": [8, 10]}))
    inputs = flux_inputs((10, 8))
    warm_up = {**inputs, "img_ids": torch.zeros_like(inputs["img_ids"])}
    with torch.no_grad():
        for case in (warm_up, inputs):
            expected = main_output(built.model(**case))
            torch.testing.assert_close(main_output(run(**case)), expected, rtol=1e-4, atol=1e-4)


class Pipe(nn.Module):
    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, **inputs: Any) -> Any:
        return self.transformer(**inputs)


def test_position_ids_are_followed_inside_a_prepared_wrapper() -> None:
    model: Any = build("flux").model
    expected = {grid: flux_masked(model, flux_inputs(grid), grid) for grid in [(8, 10), (10, 8)]}
    pipe = gna_compile.prepare(Pipe(model), policy())
    model.compile_repeated_blocks(backend="gna", options={"inner": "aot_eager"})
    for grid, wanted in expected.items():
        with torch.no_grad():
            actual = main_output(pipe(**flux_inputs(grid)))
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_leading_axis_of_length_one_is_no_contradiction(prepared: bool) -> None:
    model: Any = build("flux").model
    rules = policy({"window": ["full", 3, 3]}, layout={"grid": [1, 8, 10]})
    inputs = flux_inputs((8, 10))
    expected = flux_masked(model, inputs, (8, 10))
    if prepared:
        gna_compile.prepare(model, rules)
    with torch.no_grad():
        actual = main_output(compiled(model, None if prepared else rules)(**inputs))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_new_ids_are_read_once_whether_they_fit_or_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = compiled(build("flux").model, policy())
    other = flux_inputs((10, 8))
    reads = 0

    def counting(ids: Tensor) -> Any:
        nonlocal reads
        reads += 1
        return pieces_of(ids)

    with caplog.at_level(logging.WARNING, "gna_compile"):
        run(**flux_inputs((8, 10)))
        monkeypatch.setattr(position_ids, "pieces_of", counting)
        for _ in range(3):
            run(**other)
    assert reads == 1
    assert caplog.text.count("using dense attention") == 1


def test_a_module_of_two_names_needs_one_rule(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Net(), image()
    model.get_submodule("blocks.1").attn = model.get_submodule("blocks.0.attn")
    expected = model(x)
    with caplog.at_level(logging.WARNING, "gna_compile"):
        gna_compile.prepare(model, policy({"layers": "blocks.0", "window": 3}, {"dense": True}))
    assert "blocks.0.attn and blocks.1.attn are one module" in caplog.text
    torch.testing.assert_close(compiled(model, None)(x), expected, rtol=1e-4, atol=1e-5)


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def step(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.mark.parametrize("form", ["closure", "attribute"])
def test_a_prepared_model_is_found_behind_a_function(form: str) -> None:
    model, x = Net(), image()
    expected = run_masked(model, x)
    gna_compile.prepare(model, policy())
    function = Trainer(model).step if form == "attribute" else lambda x: model(x)
    torch.testing.assert_close(compiled(function, None)(x), expected, rtol=1e-4, atol=1e-5)


def test_a_phase_of_another_policy_is_the_default() -> None:
    phased, plain, x = Net(), Net(), image()
    runs = compiled(phased, PHASED), compiled(plain, policy(phases=["steady"]))
    for run in runs:
        run(x)
    with gna_compile.phase("warmup"):
        torch.testing.assert_close(runs[0](x), phased(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(runs[1](x), run_masked(plain, x), rtol=1e-4, atol=1e-5)


def test_explain_names_the_policy_error() -> None:
    with pytest.raises(gna_compile.PolicyError, match=r"wan2\.1-720p"):
        gna_compile.explain(Net(), image(), policy="wan2.1-720")


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_symbolic_head_size(inner: str) -> None:
    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    rules = policy(layout={"grid": list(GRID)})
    run = compiled(attend, rules, inner=inner, dynamic=True)
    visible = oracle.mask(GRID, (3, 3))
    for head_dim in (8, 16):
        x = torch.randn(1, 2, 48, head_dim)
        expected = F.scaled_dot_product_attention(x, x, x, attn_mask=visible)
        torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-5)


def test_a_reset_before_the_first_graph_imports_nothing() -> None:
    """Dynamo walks over its backends while it resets them; an import may compile one more."""
    script = (
        "import sys, gna_compile.backend as backend\n"
        "before = set(sys.modules)\n"
        "backend.gna.reset()\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
