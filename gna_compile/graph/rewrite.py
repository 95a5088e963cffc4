"""Replaces decided attention sites by the op, and nothing else.

Before: `scaled_dot_product_attention(q, k, v, ...)`, or unfused matmul, softmax and matmul.
After: `gna.attention.v2(q, k, v, pattern, ...)[0]`, with the same dtype, shape and memory
order, the same metadata, and casts where autocast would have cast. Grid sizes that are symbols
become nodes computed from the graph's own size inputs. Gains what the FLOP share says; needs a
provider that takes the problem (`decide` asked for one).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import sympy
import torch
from torch import fx

from gna_compile import _torch
from gna_compile.graph.functorch import plain, stand_in
from gna_compile.graph.mutation import written_by
from gna_compile.graph.pattern import Windows, entries_of
from gna_compile.graph.sites.find import Site
from gna_compile.graph.symbols import entry_of, hint
from gna_compile.graph.tokens.layouts import Layout

Rewrite = tuple[Site, Layout, Windows]


def rewrite(rewrites: Iterable[Rewrite], *, verify_masks: bool = False) -> None:
    """Rewrites the sites in place, lints their graphs and recompiles their modules.

    Args:
        rewrites: site, layout and windows of each site to replace.
        verify_masks: assert at run time that a mask declared as hiding global tokens only hides
            nothing on the grid.
    """
    sizes: dict[fx.Graph, SizeNodes] = {}
    owners: dict[fx.GraphModule, None] = {}
    for site, layout, windows in rewrites:
        graph = site.node.graph
        if graph not in sizes:
            sizes[graph] = SizeNodes(graph)
        _replace(site, layout, windows, sizes[graph], verify_masks)
        owners[site.owner] = None
    for owner in owners:
        owner.graph.lint()
        owner.recompile()


def _replace(
    site: Site, layout: Layout, windows: Windows, sizes: SizeNodes, verify_masks: bool
) -> None:
    node = site.node
    original = node.meta["example_value"]
    assert site.query is not None and site.key is not None and site.value is not None
    build = _Builder(node)
    key = site.key
    if site.key_transposed:
        key = build.method("transpose", key, -2, -1)
    operands = [site.query, key, site.value]
    operands = [
        operand
        if operand.meta["example_value"].dtype == site.dtype
        else build.method("to", operand, site.dtype)
        for operand in operands
    ]
    operands = [_with_one_batch(build, operand) for operand in operands]
    key_mask = None
    if site.mask is not None:
        key_mask = _key_mask(build, site, layout, sizes, verify_masks)
    # A symbolic head_dim is held to its value: the scale is a number in the op.
    scale = site.scale if site.scale is not None else int(site.head_dim) ** -0.5
    pair = build.function(
        torch.ops.gna.attention.v2,
        *operands,
        entries_of(
            layout,
            windows,
            sizes.node_for(operands[0].meta["example_value"].shape[1]),
            sizes.node_for,
        ),
        key_mask,
        scale,
        _order_with_one_batch(memory_order(original)),
    )
    output = _with_all_batches(build, build.function(operator.getitem, pair, 0), site.query)
    if site.query_mask is not None:
        output = build.method(
            "masked_fill", output, build.method("logical_not", site.query_mask), 0
        )
    _require_same_tensor(output.meta["example_value"], original)
    output.meta["example_value"] = original
    node.replace_all_uses_with(output)
    erase_unused(node)


def _with_one_batch(build: _Builder, operand: fx.Node) -> fx.Node:
    """An operand of three or more dimensions as [batch, heads, tokens, head_dim]."""
    rank = operand.meta["example_value"].ndim
    if rank == 3:
        return build.method("unsqueeze", operand, 1)
    return operand if rank == 4 else build.method("flatten", operand, 0, rank - 4)


def _order_with_one_batch(order: list[int]) -> list[int]:
    """The memory order of the output with one batch for one with this order, outermost first."""
    if len(order) == 3:
        four = [0 if dim == 0 else dim + 1 for dim in order]
        four.insert(four.index(0) + 1, 1)
        return four
    leading = len(order) - 3
    return [max(dim - leading + 1, 0) for dim in order if dim == 0 or dim >= leading]


def _with_all_batches(build: _Builder, output: fx.Node, query: fx.Node) -> fx.Node:
    """The output [batch, heads, tokens, head_dim] in the shape of the query and its memory order."""
    original = build.anchor.meta["example_value"]
    if original.ndim == 4:
        return output
    if original.ndim == 3:
        return build.method("squeeze", output, 1)
    output = build.method("view_as", output, query)
    order = memory_order(original)
    first = order.index(0)
    leading = original.ndim - 3
    if order[first : first + leading] == list(range(leading)):
        return output
    # Its batch dimensions do not follow each other in memory, as they do in the op's output.
    output = build.method("contiguous", build.method("permute", output, *order))
    return build.method("permute", output, *(order.index(dim) for dim in range(len(order))))


def _key_mask(
    build: _Builder, site: Site, layout: Layout, sizes: SizeNodes, verify_masks: bool
) -> fx.Node:
    """The part of a [batch or 1, 1, 1, tokens] mask that covers the global tokens, [batch, global]."""
    assert site.mask is not None
    flat = build.method("reshape", site.mask, -1, sizes.node_for(site.tokens))

    def columns(start: Any, length: Any) -> fx.Node:
        return build.method("narrow", flat, 1, sizes.node_for(start), sizes.node_for(length))

    parts = [columns(at, size) for at, size in layout.placed if not isinstance(size, tuple)]
    mask = parts[0] if len(parts) == 1 else build.function(torch.cat, parts, 1)
    if verify_masks:
        for start, grid in layout.placed:
            if isinstance(grid, tuple):
                build.function(
                    _torch.assert_async,
                    build.method("all", columns(start, prod(grid))),
                    f"{site.layer or 'an attention layer'}: its mask was taken for one of global "
                    "tokens (`key_mask: global_tokens`), but it hides tokens of the grid",
                )
    return build.method("expand", mask, sizes.node_for(site.batch), -1)


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Dimensions of a tensor from outermost to innermost in memory."""
    strides = [hint(s) for s in tensor.stride()]
    return sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim))


def _require_same_tensor(new: torch.Tensor, old: torch.Tensor) -> None:
    same = new.shape == old.shape and new.dtype == old.dtype and new.device == old.device
    if not same:
        raise AssertionError(
            f"the rewritten site gives {new.dtype} {list(new.shape)}, "
            f"the original {old.dtype} {list(old.shape)}"
        )


def erase_unused(node: fx.Node) -> None:
    """Erases a replaced node, and what only it needed, as far as that has no side effect."""
    pending = [node]
    while pending:
        candidate = pending.pop()
        if candidate.users or _torch.is_erased(candidate) or not _is_pure(candidate):
            continue
        inputs = candidate.all_input_nodes
        candidate.graph.erase_node(candidate)
        pending.extend(inputs)


def _is_pure(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or written_by(node):
        return False
    return node.op == "call_method" or not node.is_impure()


class _Builder:
    """Inserts nodes before a site's node, with its metadata and a computed example value."""

    def __init__(self, site_node: fx.Node) -> None:
        self.anchor = site_node
        self.graph = site_node.graph

    def function(self, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.anchor):
            return self._finish(self.graph.call_function(target, args))

    def method(self, name: str, *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.anchor):
            return self._finish(self.graph.call_method(name, args))

    def _finish(self, node: fx.Node) -> fx.Node:
        node.meta = {k: v for k, v in self.anchor.meta.items() if k not in _VALUES}
        node.meta["example_value"] = evaluate(node, self.anchor.meta["example_value"])
        return node


_VALUES = ("example_value", "val", "tensor_dict", "unbacked_bindings")


def evaluate(node: fx.Node, like: torch.Tensor) -> Any:
    """The example value of a new node, from those of its inputs, in the fake mode of `like`."""

    def value(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            argument = argument.meta["example_value"]
        return stand_in(argument) if isinstance(argument, torch.Tensor) else argument

    args = fx.node.map_arg(node.args, value)
    with _torch.fake_mode(plain(like)), torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:])
        return node.target(*args)  # type: ignore[operator]


class SizeNodes:
    """Nodes for symbolic sizes, computed from the size symbols that enter a graph.

    Inside the body of a higher-order operator the same symbols are inputs of the body, or sizes of
    its tensor inputs, so a grid seen in the parent graph can be rebuilt there.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._tracer = fx.proxy.GraphAppendingTracer(graph)
        self._known: dict[sympy.Expr, fx.Proxy] = {}
        self._anchor = _first_computation(graph)

    def node_for(self, size: Any) -> Any:
        """A node whose value is `size`, or `size` itself if it is a plain int.

        Raises:
            KeyError: if a symbol of the size does not enter the graph.
        """
        if isinstance(size, int):
            return size
        expr = _torch.expression(size)
        if expr.is_Integer:
            return int(expr)
        if expr not in self._known:
            with self.graph.inserting_before(self._anchor):
                for symbol in sorted(expr.free_symbols, key=str):
                    if symbol not in self._known:
                        self._known[symbol] = self._input(symbol)
                before = set(self.graph.nodes)
                self._known[expr] = _torch.sympy_interp(
                    _torch.ReferenceAnalysis, dict(self._known), expr
                )
            for node in self.graph.nodes:
                if node not in before:
                    node.meta["example_value"] = _evaluate_size(node)
        return self._known[expr].node

    def _input(self, symbol: sympy.Symbol) -> fx.Proxy:
        found = entry_of(symbol, self.graph.find_nodes(op="placeholder"))
        if found is None:
            raise KeyError(f"the size {symbol} does not enter this graph")
        node, axis = found
        if axis is not None:
            length = node.meta["example_value"].shape[axis]
            node = self.graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
            node.meta["example_value"] = length
        return fx.Proxy(node, self._tracer)


def _first_computation(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op != "placeholder")


def _evaluate_size(node: fx.Node) -> Any:
    args = fx.node.map_arg(
        node.args, lambda a: a.meta["example_value"] if isinstance(a, fx.Node) else a
    )
    return node.target(*args)  # type: ignore[operator]


def copy_with_sites(gm: fx.GraphModule, sites: Sequence[Site]) -> tuple[fx.GraphModule, list[Site]]:
    """A copy of `gm` whose graphs can be changed apart from it, and the same sites in the copy.

    Parameters and constants are shared, not copied.
    """
    import copy
    from dataclasses import fields, replace

    shared = {id(t): t for t in (*gm.parameters(), *gm.buffers())}
    shared |= {id(v): v for m in gm.modules() for v in vars(m).values() if torch.is_tensor(v)}
    twin = copy.deepcopy(gm, shared)
    modules = zip(_graph_modules(gm), _graph_modules(twin), strict=True)
    node_in: dict[fx.Node, fx.Node] = {}
    module_in: dict[fx.GraphModule, fx.GraphModule] = {}
    for old, new in modules:
        module_in[old] = new
        node_in.update(zip(old.graph.nodes, new.graph.nodes, strict=True))
    _copy_sources(gm, twin, node_in)
    copies = []
    for site in sites:
        changes: dict[str, Any] = {
            field.name: node_in[value]
            for field in fields(site)
            if isinstance(value := getattr(site, field.name), fx.Node)
        }
        copies.append(replace(site, owner=module_in[site.owner], **changes))
    return twin, copies


def _copy_sources(
    gm: fx.GraphModule, twin: fx.GraphModule, node_in: dict[fx.Node, fx.Node]
) -> None:
    """Where the inputs come from, which Dynamo notes beside the graph and a copy loses.

    Without it AOTAutograd takes parameters for inputs that change: CUDA graphs would copy all of
    them before every replay, and no guard would keep two inputs from being one tensor.
    """
    _torch.copy_sources(gm, twin)
    for old, new in node_in.items():
        _torch.copy_sources(old, new)


def _graph_modules(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
