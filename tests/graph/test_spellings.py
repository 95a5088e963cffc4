"""However a transposition is written, it is the same one: graphs by hand, in every version's forms.

Which spelling Dynamo leaves in a graph differs from version to version of torch (`k.mT` is a
`getattr` up to 2.13, and a call of `aten.mT` since), so no graph that one version makes has all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from gna_compile.graph.nodes import operator_name
from gna_compile.graph.sites.find import find_sites
from gna_compile.graph.tokens.layouts import Layout, TokenFlow

Spelling = Callable[["Builder", fx.Node], fx.Node]
aten = torch.ops.aten


class Builder:
    """A graph with what Dynamo notes of each node."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.inputs: list[Tensor] = []

    def input(self, name: str, *shape: int) -> fx.Node:
        value = torch.randn(*shape)
        node = self.graph.placeholder(name)
        node.meta["example_value"] = self.mode.from_tensor(value)
        self.inputs.append(value)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self._noted(self.graph.call_function(target, args, kwargs))

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self._noted(self.graph.call_method(name, args, kwargs))

    def _noted(self, node: fx.Node) -> fx.Node:
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda item: item.meta["example_value"]
        )
        with self.mode:
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        node.meta["example_value"] = value
        return node

    def module(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule(torch.nn.Module(), self.graph)


def rank(node: fx.Node) -> int:
    return int(node.meta["example_value"].dim())


def last_swapped(node: fx.Node) -> list[int]:
    return [*range(rank(node) - 2), rank(node) - 1, rank(node) - 2]


SPELLINGS: dict[str, Spelling] = {
    "getattr mT": lambda b, x: b.call(getattr, x, "mT"),
    "getattr mH": lambda b, x: b.call(getattr, x, "mH"),
    "aten.mT": lambda b, x: b.call(aten.mT, x),
    "aten.mT.default": lambda b, x: b.call(aten.mT.default, x),
    "aten.mH": lambda b, x: b.call(aten.mH, x),
    "aten.mH.default": lambda b, x: b.call(aten.mH.default, x),
    "adjoint()": lambda b, x: b.method("adjoint", x),
    "torch.adjoint": lambda b, x: b.call(torch.adjoint, x),
    "aten.adjoint": lambda b, x: b.call(aten.adjoint, x),
    "transpose()": lambda b, x: b.method("transpose", x, -1, -2),
    "transpose() from the front": lambda b, x: b.method("transpose", x, rank(x) - 2, rank(x) - 1),
    "transpose() by names": lambda b, x: b.method("transpose", x, dim0=-2, dim1=-1),
    "torch.transpose": lambda b, x: b.call(torch.transpose, x, -2, -1),
    "torch.transpose by names": lambda b, x: b.call(torch.transpose, input=x, dim0=-2, dim1=-1),
    "aten.transpose": lambda b, x: b.call(aten.transpose, x, -1, -2),
    "aten.transpose.int": lambda b, x: b.call(aten.transpose.int, x, -1, -2),
    "torch.transpose_copy": lambda b, x: b.call(torch.transpose_copy, x, -1, -2),
    "swapaxes()": lambda b, x: b.method("swapaxes", x, -1, -2),
    "swapdims()": lambda b, x: b.method("swapdims", x, dim0=-1, dim1=-2),
    "torch.swapaxes": lambda b, x: b.call(torch.swapaxes, x, axis0=-1, axis1=-2),
    "torch.swapdims": lambda b, x: b.call(torch.swapdims, x, -1, -2),
    "permute()": lambda b, x: b.method("permute", x, *last_swapped(x)),
    "permute() of a list": lambda b, x: b.method("permute", x, last_swapped(x)),
    "permute() by name": lambda b, x: b.method("permute", x, dims=last_swapped(x)),
    "torch.permute": lambda b, x: b.call(torch.permute, x, last_swapped(x)),
    "torch.permute_copy": lambda b, x: b.call(torch.permute_copy, x, last_swapped(x)),
    "aten.permute": lambda b, x: b.call(aten.permute.default, x, last_swapped(x)),
    "movedim()": lambda b, x: b.method("movedim", x, -1, -2),
    "moveaxis()": lambda b, x: b.method("moveaxis", x, source=-2, destination=-1),
    "torch.movedim": lambda b, x: b.call(torch.movedim, x, -2, -1),
    "torch.moveaxis": lambda b, x: b.call(torch.moveaxis, x, -1, -2),
    "aten.movedim": lambda b, x: b.call(aten.movedim.int, x, -1, -2),
}
# Only of two dimensions.
FLAT_SPELLINGS: dict[str, Spelling] = {
    **SPELLINGS,
    "t()": lambda b, x: b.method("t", x),
    "torch.t": lambda b, x: b.call(torch.t, x),
    "aten.t": lambda b, x: b.call(aten.t.default, x),
    "getattr T": lambda b, x: b.call(getattr, x, "T"),
    "getattr H": lambda b, x: b.call(getattr, x, "H"),
    "aten.numpy_T": lambda b, x: b.call(aten.numpy_T, x),
    "aten.matrix_H": lambda b, x: b.call(aten.matrix_H, x),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("shape", [(2, 12, 8), (2, 3, 12, 8)])
def test_keys_transposed_in_every_spelling(spelling: str, shape: tuple[int, ...]) -> None:
    assert_keys_are_found([spelling], shape)


@given(st.lists(st.sampled_from(sorted(SPELLINGS)), min_size=1, max_size=5))
def test_keys_transposed_again_and_again(spellings: list[str]) -> None:
    assert_keys_are_found(spellings, (2, 3, 8, 8))


def assert_keys_are_found(spellings: list[str], shape: tuple[int, ...]) -> None:
    """Attention whose keys are transposed so often; an even number needs one more to fit."""
    build = Builder()
    query, key, value = (build.input(name, *shape) for name in "qkv")
    turned = key
    for spelling in spellings:
        turned = SPELLINGS[spelling](build, turned)
    if len(spellings) % 2 == 0:
        turned = build.call(getattr, turned, "mT")
    weights = build.call(torch.softmax, build.call(torch.matmul, query, turned), -1)
    gm = build.module(build.call(torch.matmul, weights, value))
    (site,) = find_sites(gm)
    assert site.obstacle is None
    assert (site.query, site.key, site.value) == (query, key, value)
    assert not site.key_transposed


@pytest.mark.parametrize(
    ("spelling", "flat"),
    [(spelling, True) for spelling in FLAT_SPELLINGS] + [(name, False) for name in SPELLINGS],
)
def test_tokens_made_in_every_spelling(spelling: str, flat: bool) -> None:
    """An image [1, 8, 6, 10] or one without a batch, flattened and turned to [60, 8] tokens."""
    build = Builder()
    image = build.input("image", 1, 8, 6, 10)
    channels = build.method("flatten", image, 2)
    channels = build.method("squeeze", channels, 0) if flat else channels
    tokens = FLAT_SPELLINGS[spelling](build, channels)
    for dim in (0, 0) if flat else (1,):
        tokens = build.method("unsqueeze", tokens, dim)
    out = build.call(F.scaled_dot_product_attention, tokens, tokens, tokens)
    gm = build.module(out)
    (site,) = find_sites(gm)
    layout = TokenFlow(gm, build.inputs).layout(site)
    assert isinstance(layout, Layout), layout
    assert (layout.prefix, layout.grid, layout.suffix) == (0, (6, 10), 0)


def test_what_reverses_all_dimensions_is_no_transposition_of_the_last_two() -> None:
    build = Builder()
    q, k = build.input("q", 8, 8, 8), build.input("k", 8, 8, 8)
    turned = build.call(aten.numpy_T, k)
    weights = build.call(torch.softmax, build.call(torch.matmul, q, turned), -1)
    (site,) = find_sites(build.module(build.call(torch.matmul, weights, q)))
    assert site.key is turned


@pytest.mark.parametrize("attribute", ["shape", "dtype", "device", "ndim"])
def test_attributes_that_are_no_tensors_are_read(attribute: str) -> None:
    build = Builder()
    node = build.call(getattr, build.input("x", 2, 3), attribute)
    assert operator_name(node) == "getattr"
