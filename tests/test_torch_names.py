"""Private names of torch: all in one place, all there on this torch, and none that anything hangs on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_net import Net, image, policy
from torch import Tensor, nn

import gna_compile
from gna_compile import _torch, explain, lower, prepare
from gna_compile.graph.mutation import shares_memory
from gna_compile.options import Options, OptionsError
from gna_compile.providers.flex import provider as flex
from gna_compile.reasons import Reason

PACKAGE = Path(gna_compile.__file__).parent
FILES = [path for path in PACKAGE.rglob("*.py") if path.name != "_torch.py"]
OURS = {name for name in vars(_torch) if not name.startswith("__")} | _torch.NAMES.keys()


class Without:
    """Takes names away from torch, as far as this package looks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, name: str) -> None:
        entry = _torch.NAMES[name]
        if entry.is_there is None:
            entry = entry._replace(where=f"{entry.where}_that_is_gone")
        else:
            entry = entry._replace(is_there=lambda: False)
        self._monkeypatch.setitem(_torch.NAMES, name, entry)
        _torch.forget()


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Without]:
    torch._dynamo.reset()
    yield Without(monkeypatch)
    monkeypatch.undo()
    _torch.forget()
    torch._dynamo.reset()


def run(model: nn.Module, *inputs: Tensor, dynamic: bool | None = None, **options: Any) -> Tensor:
    torch._dynamo.reset()
    options = {"policy": policy(), "inner": "eager", **options}
    with torch.no_grad():
        out: Tensor = torch.compile(model, backend="gna", options=options, dynamic=dynamic)(*inputs)
    return out


def reasons(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> set[str]:
    torch._dynamo.reset()
    rows = explain(model, *inputs, policy=policy(), quiet=True, **kwargs).rows
    return {row.reason for row in rows}


# --- one place -------------------------------------------------------------------------------------


ATTRIBUTES = {"_cdata", "_schema", "_qualified_op_name", "_dynamo_source", "_erased", "shape_env"}
ATTRIBUTES |= {"_param_name_to_source", "fake_mode"}


def private_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                path = f"{module}.{alias.name}" if module else alias.name
                if re.match(r"torch\..*(\b_|experimental)", path):
                    yield path
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if (
                re.match(r"torch\.(\w+\.)*_[^_]", text)
                or "experimental" in text
                or node.attr in ATTRIBUTES
                or re.search(r"\.node\.(expr|hint)$", text)
            ):
                yield text
        elif isinstance(node, ast.Constant) and node.value in ATTRIBUTES:
            yield str(node.value)


def test_private_names_are_in_one_place() -> None:
    for path in FILES:
        found = set(private_names(ast.parse(path.read_text())))
        assert {text for text in found if not text.startswith("_torch.")} == set(), path


def test_what_is_used_is_listed() -> None:
    for path in FILES:
        assert set(re.findall(r"\b_torch\.(\w+)", path.read_text())) <= OURS, path


def test_what_is_listed_is_used() -> None:
    text = "\n".join(path.read_text() for path in (*FILES, PACKAGE / "_torch.py"))
    for name, entry in _torch.NAMES.items():
        *_, last = entry.where.split(".")
        assert len(re.findall(rf"\b{name}\b|\.{last}\b", text)) > 1, name


@pytest.mark.parametrize("name", _torch.NAMES)
def test_listed_names_are_on_this_torch(name: str) -> None:
    entry = _torch.NAMES[name]
    assert entry.feature in _torch.FEATURES
    assert re.fullmatch(r"2\.\d+ to 2\.\d+", entry.read)
    _torch._look_up(name)


def test_every_feature_has_names() -> None:
    assert {entry.feature for entry in _torch.NAMES.values()} == _torch.FEATURES.keys()


def test_probing_imports_nothing() -> None:
    script = (
        "import sys, torch._dynamo; before = set(sys.modules); import gna_compile.backend; "
        "print([m for m in set(sys.modules) - before if m.startswith('torch')])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


# --- each of them gone -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", _torch.NAMES)
def test_without_a_name_all_else_goes_on(name: str, without: Without) -> None:
    model, x = Net(depth=1), image()
    rewritten, dense = run(model, x), model(x)
    assert not torch.allclose(rewritten, dense)
    without(name)
    feature = _torch.NAMES[name].feature
    for dynamic in (False, True):
        is_dense = feature in ("rewriting", "op") or (feature == "symbolic sizes" and dynamic)
        out = run(model, x, dynamic=dynamic)
        torch.testing.assert_close(out, dense if is_dense else rewritten)
    assert _torch.why_not(feature) is not None


@pytest.mark.parametrize("feature", _torch.FEATURES)
def test_a_missing_name_is_said_at_import(
    feature: str, without: Without, caplog: pytest.LogCaptureFixture
) -> None:
    name = next(name for name, entry in _torch.NAMES.items() if entry.feature == feature)
    for entry in _torch.NAMES.values():
        __import__(entry.where.partition(":")[0])
    _torch.forget()
    _torch.probe()
    assert caplog.text == ""
    without(name)
    _torch.probe()
    assert _torch.FEATURES[feature] in caplog.text
    assert len(caplog.records) == 1


def test_without_what_graphs_are_read_by_they_stay_dense(
    without: Without, caplog: pytest.LogCaptureFixture
) -> None:
    without("OpOverload")
    assert reasons(Net(), image()) == set()
    assert "torch._ops.OpOverload_that_is_gone" in caplog.text
    assert "leaves this graph dense" in caplog.text


def test_without_what_the_op_takes_sites_say_so(without: Without) -> None:
    without("after_autograd_keyset")
    assert reasons(Net(), image()) == {Reason.TORCH.value}


def test_without_symbols_only_graphs_that_have_some_decline(without: Without) -> None:
    without("sympy_interp")
    assert reasons(Net(), image()) == {""}
    torch._dynamo.reset()
    x = image()
    torch._dynamo.mark_dynamic(x, 2)
    assert reasons(Net(), x) == {Reason.TORCH.value}


def test_without_guards_an_annotation_is_not_read(
    monkeypatch: pytest.MonkeyPatch, without: Without, caplog: pytest.LogCaptureFixture
) -> None:
    """The name itself is deleted, and Dynamo does without it for as long."""
    monkeypatch.delattr("torch._dynamo.guards.GuardBuilder.EQUALS_MATCH")
    _torch.forget()
    prepare(Net(), policy())
    assert "EQUALS_MATCH" in caplog.text
    assert "prepare says of a model is not read" in caplog.text
    assert _torch.why_not("prepare") is not None


def test_without_the_frame_declared_grids_are_not_believed(without: Without) -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    declared = policy(layout={"grid": [6, 8]})
    x = torch.randn(1, 2, 48, 8)
    (row,) = explain(Tokens(), x, policy=declared, quiet=True).rows
    assert row.reason == ""
    without("current_tx")
    torch._dynamo.reset()
    (row,) = explain(Tokens(), x, policy=declared, quiet=True).rows
    assert row.reason == Reason.TORCH.value
    assert "current_tx" in row.detail


def test_without_storages_tensors_may_share_memory(without: Without) -> None:
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in "xy"]
    for node in nodes:
        node.meta["example_value"] = torch.zeros(2)
    assert not shares_memory(*nodes)
    without("storage_key")
    assert shares_memory(*nodes)


def test_without_an_assertion_masks_are_not_believed(without: Without) -> None:
    without("assert_async")
    assert reasons(Net(), image()) == {""}
    assert _torch.why_not("verify_masks") is not None


def test_without_kernels_flex_says_so(without: Without, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    without("make_fx")
    flex._unusable_on.cache_clear()
    try:
        assert "make_fx" in str(flex._unusable_on(0, torch.float32, 64))
    finally:
        flex._unusable_on.cache_clear()


def test_without_inductors_wrapper_its_options_are_not_taken(
    without: Without, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("torch._TorchCompileInductorWrapper")
    _torch.forget()
    x = torch.randn(3)
    for inductor in (None, {"max_autotune": False}):
        assert "not taken" not in caplog.text
        run = lower.lower(torch.fx.symbolic_trace(Pair()), [x], inductor=inductor)
        assert torch.equal(run(x)[0], x.relu())
    assert "options 'mode' and 'inductor' are not taken" in caplog.text


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.relu(),)


def test_without_the_registry_a_graph_runs_as_it_is(
    without: Without, caplog: pytest.LogCaptureFixture
) -> None:
    without("lookup_backend")
    x = torch.randn(3)
    run = lower.lower(torch.fx.symbolic_trace(Pair()), [x], inner="aot_eager")
    assert torch.equal(run(x)[0], x.relu())
    assert "not through 'aot_eager'" in caplog.text


def test_without_dynamos_way_random_numbers_are_kept(without: Without) -> None:
    without("preserve_rng_state")
    before = torch.get_rng_state()
    with _torch.random_numbers_kept():
        torch.randn(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_the_limit_nothing_is_said_of_it(without: Without) -> None:
    without("recompile_limit")
    assert _torch.recompile_limit() is None
    assert reasons(Net(), image()) == {""}


def test_without_the_names_of_inductors_options_none_is_recognized(without: Without) -> None:
    with pytest.raises(OptionsError, match="go under 'inductor'"):
        Options.parse({"max_autotune": True})
    without("inductor_options")
    with pytest.raises(OptionsError, match="known options are"):
        Options.parse({"max_autotune": True})


def test_without_what_the_op_takes_calling_it_says_so() -> None:
    script = (
        "import torch; del torch._C._after_autograd_keyset; import gna_compile.backend, gna_compile\n"
        "try: gna_compile.neighborhood_attention\n"
        "except RuntimeError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "has no torch._C._after_autograd_keyset (the dispatch keys below" in found.stdout
    assert "every graph stays dense, and neighborhood_attention raises" in found.stderr


def test_what_was_tested_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _torch._oldest() == "2.11"
    for version, words in {
        "2.10.0": "tested: 2.11 to",
        "2.11.0+cu130": "",
        f"{_torch.TESTED}.3": "",
        "3.0.0a0+git123": "tested: 2.11 to",
    }.items():
        monkeypatch.setattr(torch, "__version__", version)
        assert _torch.untested().startswith(words)
        assert bool(_torch.untested()) == bool(words)


def test_doctor_prints_what_it_probed(without: Without) -> None:
    assert all(text.startswith("ok (") for text in _torch.probes().values())
    without("install_guard")
    text = _torch.probes()["prepare"]
    assert text.startswith("off, what gna_compile.prepare says")
    assert "install_guard_that_is_gone (guards on an annotation)" in text
