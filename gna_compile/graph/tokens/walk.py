"""Follows tokens through a Dynamo graph and its subgraphs, in order, at one point of its sizes.

Operators have rules (`movement.py`, `compute.py`, `space.py`). Whatever has none returns a tensor
of which only the origins are known, and so does a rule whose result has another shape than the
graph says. A write in place changes what is known of the tensor and of whatever shares its memory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import count, pairwise
from typing import Any

import torch
from torch import fx

from gna_compile import _torch
from gna_compile.graph.mutation import written_by
from gna_compile.graph.nodes import operator_name, tensor_of
from gna_compile.graph.sites.unfused import match
from gna_compile.graph.tokens import movement, space
from gna_compile.graph.tokens.call import PARTIAL, Call, Unruled, Value, are_equal, tokens_in
from gna_compile.graph.tokens.cells import Source, Tokens, lattice
from gna_compile.graph.tokens.compute import attended, rule_for
from gna_compile.graph.tokens.constants import Buffers
from gna_compile.graph.tokens.memory import (
    OVERLAPPING,
    VIEWS,
    are_apart,
    body_of,
    storages,
    views_up,
    written_in_body,
)
from gna_compile.graph.tokens.movement import counted, new
from gna_compile.graph.tokens.position_ids import may_be_ids
from gna_compile.graph.tokens.samples import Transforms
from gna_compile.graph.tokens.sizes import Sizes
from gna_compile.graph.tokens.weights import is_weight
from gna_compile.graph.tokens.writes import written_through

__all__ = ["Operands", "Walk", "movement", "space"]

Environment = dict[fx.Node, Value]
Operands = tuple[Tokens, Tokens, Tokens]
"""What is known of the query, key and value of an attention, [.., tokens, head_dim] each."""

# Higher-order operators that call their one body with the operands that follow it.
_CALLS = frozenset(
    {
        "tag_activation_checkpoint",
        "wrap_activation_checkpoint",
        "wrap",
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
        "inline_asm_elementwise",
        "invoke_subgraph",
        "hints_wrapper",
        "strict_mode",
    }
)
_PICKING = frozenset({"embedding", "index_select", "gather", "take_along_dim", "getitem"})
_NAME = re.compile(r"^l_(kwargs_)?|_$")  # Dynamo's own around the name of an argument
_OWNED = re.compile(r"^L\['self'\]\.|_(buffers|modules|parameters)\b")


class Walk:
    """What is known of the operands of every attention in a graph, at one point of its sizes.

    Args:
        gm: the graph.
        inputs: its inputs; None if not known.
        sizes: the point.
        with_tables: follow tables of positions, too. They show the grid of a flat sequence, and
            cost the most.
        is_whole: the inputs are a model's own, for which conventions hold, and not what one part
            of it hands to another.

    Attributes:
        attentions: for each graph module (by `id`) and node that ends an attention, the operands
            of every call of it.
        buffers: integer tensors of modules, and which of them were looked at.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any] | None,
        sizes: Sizes,
        with_tables: bool = False,
        is_whole: bool = True,
    ) -> None:
        self.attentions: dict[tuple[int, fx.Node], list[Operands]] = defaultdict(list)
        self._sizes = sizes
        self._with_tables = with_tables
        self._is_whole = is_whole
        self.buffers = Buffers()
        # Equal calls on the same tokens give the same tokens: layers are looked at once.
        self._results: dict[Any, tuple[Value, list[Tokens]]] = {}
        self._entries = count(1)
        self._entry = 0
        self._transforms = Transforms()
        self._plain: dict[tuple[int, ...], Tokens] = {}
        self._matches: dict[int, dict[fx.Node, tuple[fx.Node, fx.Node, bool, fx.Node]]] = {}
        placeholders = gm.graph.find_nodes(op="placeholder")
        given = inputs if inputs is not None and len(inputs) == len(placeholders) else None
        operands: list[Value] = [
            self._input(node, given[i] if given is not None else None)
            for i, node in enumerate(placeholders)
        ]
        self._run(gm, operands)

    def _input(self, node: fx.Node, value: Any) -> Value:
        """The tokens of an input of the whole graph: a parameter carries none."""
        tensor = tensor_of(node)
        if tensor is None:
            return None
        shape = self._sizes.shape(tensor)
        if isinstance(value, torch.nn.Parameter) or 0 in shape or is_weight(node):
            return self._without_cells(shape)
        if _OWNED.search(_torch.source_name(node)):  # a buffer of a module, or an attribute
            if isinstance(value, torch.Tensor):
                self.buffers.add(node, value)
            return self._table(node, shape)
        source = Source(_NAME.sub("", node.name), "input", shape)
        if self._is_whole and len(shape) in (4, 5) and tensor.dtype.is_floating_point:
            source.is_image, source.channels = True, 1 if len(shape) == 4 else None
        if isinstance(value, torch.Tensor) and may_be_ids(node.name, value):
            source.node, source.values = node, value
        return lattice(source)

    def _without_cells(self, shape: tuple[int, ...]) -> Tokens:
        return self._plain.setdefault(shape, Tokens(shape, {}))

    def _table(self, node: fx.Node, shape: tuple[int, ...]) -> Tokens:
        if self._with_tables:
            return lattice(Source(node.name, "table", shape))
        return self._without_cells(shape)

    def _run(self, gm: fx.GraphModule, operands: Sequence[Value] | None) -> list[Value]:
        """Walks one graph; `operands` are its placeholders' values, None if not known."""
        known: Environment = {}
        memory: dict[Any, list[fx.Node]] = defaultdict(list)
        inputs = iter(operands) if operands is not None else None
        result: list[Value] = []
        for node in gm.graph.nodes:
            if node.op == "output":
                returned = node.args[0]
                items = returned if isinstance(returned, list | tuple) else (returned,)
                result = [known.get(item) if isinstance(item, fx.Node) else None for item in items]
                continue
            if node.op == "placeholder":
                value = next(inputs) if inputs is not None else None
                known[node] = self._outside(node) if value is None else value
            elif node.op == "get_attr":
                known[node] = self._attribute(gm, node)
            else:
                known[node] = self._call(gm, node, known)
            for storage in storages(node):
                memory[storage].append(node)
            if node.op in ("call_function", "call_method"):
                self._written(gm, node, known, memory)
        return result

    def _outside(self, node: fx.Node) -> Value:
        """The tokens of a subgraph's input of which nothing is known."""
        tensor = tensor_of(node)
        if tensor is None:
            return None
        shape = self._sizes.shape(tensor)
        root = Source(node.name, "input", shape)
        return lattice(Source(node.name, "opaque", shape, frozenset({root})))

    def _attribute(self, gm: fx.GraphModule, node: fx.Node) -> Value:
        owner: Any = gm
        for part in str(node.target).split("."):
            owner = getattr(owner, part, None)
        if isinstance(owner, torch.nn.Parameter):
            return self._without_cells(tuple(owner.shape))
        return self._table(node, tuple(owner.shape)) if isinstance(owner, torch.Tensor) else None

    # --- one call ---

    def _call(self, gm: fx.GraphModule, node: fx.Node, known: Environment) -> Value:
        if isinstance(node.target, _torch.HigherOrderOperator):
            return self._checked(node, self._higher_order(gm, node, known), known)
        transform = self._transforms.visit(node)
        if transform is not None:
            value = self._transforms.value(transform, self._new_call(node, known))
            return self._checked(node, value, known)
        name = operator_name(node)
        if name == "getitem" and isinstance(node.args[0], fx.Node):
            held = known.get(node.args[0])
            if isinstance(held, list):
                index = node.args[1]
                return held[index] if isinstance(index, int) and index < len(held) else None
        if name == "softmax":
            self._match(gm, node)
        ended = self._matches.get(id(gm), {}).get(node)
        if ended is not None:
            value = self._written_out(gm, node, known, *ended)
            if value is not None:
                return value
        if name == "scaled_dot_product_attention":
            self._fused(gm, node, known)
        return self._evaluated(node, name, known)

    def _evaluated(self, node: fx.Node, name: str, known: Environment) -> Value:
        """The value of an operator that has no body, from the values of its operands."""
        return self._checked(node, self._ruled(node, name, known), known)

    def _ruled(self, node: fx.Node, name: str, known: Environment) -> Value:
        """What the operator's rule says; None if it has none, or does not know this form of call."""
        key = self._key(node, name, known)
        if key is not None and key in self._results:
            return self._results[key][0]
        # What data picks out of the same tensors is the same.
        again = (key, *node.all_input_nodes, self._entry) if name in _PICKING else None
        if key is not None and again in self._results:
            return self._results[again][0]
        rule = rule_for(name)
        call = self._new_call(node, known)
        value: Value = None
        if rule is counted and not self._with_tables:
            rule = new
        if rule is not None:
            try:
                value = rule(call)
            except (Unruled, ValueError, IndexError, TypeError, KeyError, MemoryError):
                value = None
            if name not in PARTIAL and call.is_unread:
                value = None
        if key is not None and (again or not call.makes_source):
            self._results[again if call.makes_source else key] = value, list(call.operands())
        return value

    def _key(self, node: fx.Node, name: str, known: Environment) -> Any:
        """Equal for calls that give the same; None if that cannot be told."""

        def part(item: Any) -> Any:
            if isinstance(item, fx.Node):
                value = known.get(item)
                if isinstance(value, Tokens):
                    tensor = tensor_of(item)
                    if tensor is not None and not tensor.dtype.is_floating_point:
                        return item, self._entry  # its values may matter
                    return ("tokens", id(value))
                if value is not None:
                    return item, self._entry
                item = item.meta.get("example_value")
            if isinstance(item, torch.SymInt):
                return ("size", self._sizes.of(item))
            if isinstance(item, slice):
                return ("slice", part(item.start), part(item.stop), part(item.step))
            if isinstance(item, list | tuple):
                return tuple(map(part, item))
            return item

        if not name:
            return None
        try:
            shapes = self._shapes(node)
            arguments = (part(node.args), tuple((k, part(v)) for k, v in node.kwargs.items()))
            key = (name, str(node.target), arguments, shapes)
            hash(key)
        except (TypeError, ValueError):
            return None
        return key

    def _shapes(self, node: fx.Node) -> Any:
        example = node.meta.get("example_value")
        if isinstance(example, torch.Tensor):
            return self._sizes.shape(example)
        if isinstance(example, list | tuple):
            return tuple(
                self._sizes.shape(item) if isinstance(item, torch.Tensor) else None
                for item in example
            )
        return None

    def _checked(self, node: fx.Node, value: Value, known: Environment) -> Value:
        """`value` where it has the shape of the node's result; elsewhere only origins are known."""
        example = node.meta.get("example_value")
        operands = list(tokens_in(known.get(item) for item in node.all_input_nodes))
        if isinstance(example, torch.Tensor):
            if isinstance(value, list) and len(value) == 1:
                value = value[0]
            return self._sized(node, example, value, operands, known)
        if isinstance(example, list | tuple):
            items = value if isinstance(value, list) and len(value) == len(example) else None
            return [
                self._sized(node, item, None if items is None else items[i], operands, known)
                if isinstance(item, torch.Tensor)
                else None
                for i, item in enumerate(example)
            ]
        return None

    def _sized(
        self,
        node: fx.Node,
        tensor: torch.Tensor,
        value: Value,
        operands: Sequence[Tokens],
        known: Environment,
    ) -> Value:
        try:
            shape = self._sizes.shape(tensor)
        except ValueError:
            return None
        if isinstance(value, Tokens) and value.shape == shape:
            return value if value.cells else self._without_cells(shape)
        return self._new_call(node, known).opaque(operands, shape)

    # --- attentions ---

    def _fused(self, gm: fx.GraphModule, node: fx.Node, known: Environment) -> None:
        call = self._new_call(node, known)
        try:
            operands = (
                call.tokens(call.argument(0, "query")),
                call.tokens(call.argument(1, "key")),
                call.tokens(call.argument(2, "value")),
            )
        except Unruled:
            return
        self.attentions[id(gm), node].append(operands)

    def _match(self, gm: fx.GraphModule, softmax: fx.Node) -> None:
        found = match(softmax)
        if found is not None:
            ends = self._matches.setdefault(id(gm), {})
            ends[found.node] = (found.query, found.key, found.key_transposed, found.value)

    def _written_out(
        self,
        gm: fx.GraphModule,
        node: fx.Node,
        known: Environment,
        query: fx.Node,
        key: fx.Node,
        key_transposed: bool,
        value: fx.Node,
    ) -> Value:
        found = [known.get(item) for item in (query, key, value)]
        q, k, v = found
        tensor = tensor_of(node)
        if not (isinstance(q, Tokens) and isinstance(k, Tokens) and isinstance(v, Tokens)):
            return None
        if key_transposed:
            rank = len(k.shape)
            k = movement.permuted(k, [*range(rank - 2), rank - 1, rank - 2])
        self.attentions[id(gm), node].append((q, k, v))
        shape = () if tensor is None else self._sizes.shape(tensor)
        if shape[:-1] != q.shape[:-1]:
            return None
        return attended(q, shape)

    # --- subgraphs ---

    def _higher_order(self, gm: fx.GraphModule, node: fx.Node, known: Environment) -> Value:
        target: Any = node.target
        name = target.__name__
        bodies = [
            (i, body) for i, item in enumerate(node.args) if (body := body_of(gm, item)) is not None
        ]
        if name in _CALLS and len(bodies) == 1:
            index, body = bodies[0]
            operands: Sequence[Any] = [
                item for item in node.args[index + 1 :] if not isinstance(item, str)
            ]
            return self._enter(body, operands, known)
        if name == "cond" and len(bodies) == 2:
            last = node.args[-1]
            operands = last if isinstance(last, list | tuple) else ()
            one, other = (self._enter(body, operands, known) for _, body in bodies)
            if not isinstance(one, list) or not isinstance(other, list):
                return None
            return [
                a if isinstance(a, Tokens) and isinstance(b, Tokens) and are_equal(a, b) else None
                for a, b in zip(one, other, strict=True)
            ]
        for _, body in bodies:
            self._run(body, None)
        if name == "flex_attention":
            query, _, value = (known.get(operand) for operand in node.all_input_nodes[:3])
            if isinstance(query, Tokens) and isinstance(value, Tokens):
                out = attended(query, (*query.shape[:-1], value.shape[-1]))
                return [out, None]
        return None

    def _enter(self, body: fx.GraphModule, operands: Sequence[Any], known: Environment) -> Value:
        values = [known.get(item) if isinstance(item, fx.Node) else None for item in operands]
        placeholders = body.graph.find_nodes(op="placeholder")
        if len(values) != len(placeholders):
            return self._run(body, None)
        for node, item in zip(placeholders, operands, strict=True):
            if isinstance(item, fx.Node):
                self.buffers.bind(node, item)
        # Another call of the same body: its nodes have other values.
        outer, self._entry = self._entry, next(self._entries)
        result = self._run(body, values)
        self._entry = outer
        return result

    # --- writes in place ---

    def _written(
        self,
        gm: fx.GraphModule,
        node: fx.Node,
        known: Environment,
        memory: Mapping[Any, list[fx.Node]],
    ) -> None:
        """What a call that writes in place leaves of what is known."""
        targets = written_by(node)
        if not targets and isinstance(node.target, _torch.HigherOrderOperator):
            targets = written_in_body(gm, node)
        name = operator_name(node)
        for target in targets:
            old = known.get(target)
            if not isinstance(old, Tokens):
                continue
            result = known[node]
            if not isinstance(result, Tokens) or result.shape != old.shape:
                # `setitem` has no value of its own in a graph.
                result = self._after(node, name, old, known) if len(targets) == 1 else None
            if result is None:
                operands = list(tokens_in(known.get(item) for item in node.all_input_nodes))
                result = self._new_call(node, known).opaque(operands, old.shape)
            if result is not old:
                self._replace(node, target, result, known, memory)

    def _after(self, node: fx.Node, name: str, old: Tokens, known: Environment) -> Tokens | None:
        value = self._ruled(node, name, known)
        return value if isinstance(value, Tokens) and value.shape == old.shape else None

    def _replace(
        self,
        node: fx.Node,
        target: fx.Node,
        result: Tokens,
        known: Environment,
        memory: Mapping[Any, list[fx.Node]],
    ) -> None:
        """Notes what a tensor holds now, and what that means for whatever shares its memory."""
        known[target] = result
        own = views_up(target)
        renewed = {target}
        is_shared = any(operator_name(view) in OVERLAPPING for view in own)
        for view, base in () if is_shared else pairwise(own):  # its base holds it, too
            lifted = written_through(self._new_call(view, known), known[view], known.get(base))
            if lifted is None:
                break
            known[base] = lifted
            renewed.add(base)
        stale = {other for s in storages(target) for other in memory[s]} - {target, node} - renewed
        for other in sorted(stale):
            held = known.get(other)
            chain = views_up(other)
            if not isinstance(held, Tokens | list) or are_apart(own, chain):
                continue
            name = operator_name(other)
            if len(chain) > 1 and chain[1] in renewed and name in VIEWS:
                # A view of what was written: seen through it anew.
                known[other] = (
                    self._call(_NO_MODULE, other, known)
                    if name == "getitem"
                    else self._evaluated(other, name, known)
                )
                renewed.add(other)
            else:
                known[other] = self._spoiled(other, held, result, known)

    def _spoiled(
        self, node: fx.Node, held: Tokens | list[Value], written: Tokens, known: Environment
    ) -> Value:
        """What is left of a tensor, or a tuple of them, some of whose memory was written to."""
        if isinstance(held, list):
            return [
                self._spoiled(node, item, written, known)
                if isinstance(item, Tokens | list)
                else item
                for item in held
            ]
        return self._new_call(node, known).opaque([held, written], held.shape)

    def _new_call(self, node: fx.Node, known: Environment) -> Call:
        return Call(node, known, self._sizes, self.buffers)


_NO_MODULE: Any = None
