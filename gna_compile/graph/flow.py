"""Follows the tokens through a Dynamo graph: which dimension of which tensor indexes which tokens.

`TokenFlow` runs once over the graph and its subgraphs, in order, and gives every dimension an
identity (`axes.py`, `axis_rules.py`). Identities found later (an unpatchify at the end) reach
earlier tensors, since what is unified stays unified. Then it answers, for an attention site, what
its tokens are made of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from gna_compile.graph.align import agree
from gna_compile.graph.axes import Axes, Dim, Shape
from gna_compile.graph.axis_rules import Operands, Unruled, Value, rule_for
from gna_compile.graph.values import operator_name, tensor_of

Environment = dict[fx.Node, Value]

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


class Walk:
    """One pass over a graph and its subgraphs.

    Attributes:
        axes: everything known about dimensions.
        calls: for each graph module, the values of its nodes, once per call of it.
        heads: head and head-size dimensions of fused attention; never axes of a token grid.
    """

    def __init__(self) -> None:
        self.axes = Axes()
        self.calls: dict[int, list[Environment]] = defaultdict(list)
        self.heads: list[Dim] = []

    def run(self, gm: fx.GraphModule, operands: Sequence[Value] | None) -> Value:
        """Walks one graph; `operands` are its placeholders' values, None if not known.

        Returns:
            The value of the graph's output, as a list.
        """
        known: Environment = {}
        self.calls[id(gm)].append(known)
        inputs = iter(operands) if operands is not None else None
        result: Value = None
        for node in gm.graph.nodes:
            if node.op == "output":
                returned = node.args[0]
                items = returned if isinstance(returned, list | tuple) else (returned,)
                result = [known.get(item) if isinstance(item, fx.Node) else None for item in items]
            elif node.op == "placeholder":
                value = next(inputs) if inputs is not None else None
                known[node] = self._unknown(node) if value is None else value
            elif node.op == "get_attr":
                known[node] = self._unknown(node)
            else:
                known[node] = self._call(gm, node, known)
        return result

    def _call(self, gm: fx.GraphModule, node: fx.Node, known: Environment) -> Value:
        value: Value = None
        try:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                value = self._higher_order(gm, node, known)
            else:
                value = self._operator(node, known)
        except (Unruled, ValueError, IndexError, TypeError, KeyError):
            value = None  # a form of call that the rule does not know
        return self._checked(node, value, known)

    def _operator(self, node: fx.Node, known: Environment) -> Value:
        name = operator_name(node)
        if name == "getitem" and isinstance(node.args[0], fx.Node):
            held = known.get(node.args[0])
            if isinstance(held, list):
                index = node.args[1]
                return held[index] if isinstance(index, int) else None
        rule = rule_for(name)
        if rule is None:
            return None
        call = Operands(self.axes, node, known)
        value = rule(call)
        if name == "scaled_dot_product_attention":
            query = call.first
            self.heads.extend(query[-3:-2] + query[-1:])
        return value

    def _higher_order(self, gm: fx.GraphModule, node: fx.Node, known: Environment) -> Value:
        target: Any = node.target
        name = target.__name__
        bodies = [
            (i, body) for i, item in enumerate(node.args) if (body := _body(gm, item)) is not None
        ]
        result: Value = None
        if name in _CALLS and len(bodies) == 1:
            index, body = bodies[0]
            operands: Sequence[Any] = [item for item in node.args[index + 1 :] if _is_operand(item)]
            result = self._enter(body, operands, known)
        elif name == "cond" and len(bodies) == 2:
            last = node.args[-1]
            operands = last if isinstance(last, list | tuple) else ()
            branches = [self._enter(body, operands, known) for _, body in bodies]
            result = self._joined(branches)
        else:
            for _, body in bodies:
                self.run(body, None)
            if name == "flex_attention":
                query, _, value = (known.get(operand) for operand in node.all_input_nodes[:3])
                if isinstance(query, tuple) and isinstance(value, tuple):
                    result = [(*query[:-1], value[-1]), query[:-1]]
        return result

    def _enter(self, body: fx.GraphModule, operands: Sequence[Any], known: Environment) -> Value:
        values = [known.get(item) if isinstance(item, fx.Node) else None for item in operands]
        placeholders = sum(node.op == "placeholder" for node in body.graph.nodes)
        return self.run(body, values if len(values) == placeholders else None)

    def _joined(self, branches: Sequence[Value]) -> Value:
        """The result of a conditional: dimensions that all branches agree on."""
        first, *others = branches
        if not isinstance(first, list):
            return None
        result: list[Value] = []
        for i, value in enumerate(first):
            rivals = [other[i] if isinstance(other, list) else None for other in others]
            if isinstance(value, tuple):
                shape = [
                    dim if all(self._is_at(rival, j, dim) for rival in rivals)
                    else self.axes.new(dim.size, opaque=True)
                    for j, dim in enumerate(value)
                ]  # fmt: skip
                result.append(tuple(shape))
            else:
                result.append(None)
        return result

    def _is_at(self, value: Value, index: int, dim: Dim) -> bool:
        if not isinstance(value, tuple) or index >= len(value):
            return False
        return self.axes.find(value[index]) is self.axes.find(dim)

    def _checked(self, node: fx.Node, value: Value, known: Environment) -> Value:
        """`value` where it has the sizes of the node's result, new dimensions elsewhere.

        New dimensions of what is made of other tensors may be theirs in another order.
        """
        result = node.meta.get("example_value")
        derived = any(known.get(operand) is not None for operand in node.all_input_nodes)
        if isinstance(result, torch.Tensor):
            if isinstance(value, list) and len(value) == 1:
                value = value[0]
            return self._sized(result, value, derived)
        if isinstance(result, list | tuple):
            items = value if isinstance(value, list) and len(value) == len(result) else None
            return [
                self._sized(item, items[i] if items is not None else None, derived)
                if isinstance(item, torch.Tensor)
                else None
                for i, item in enumerate(result)
            ]
        return None

    def _sized(self, tensor: torch.Tensor, value: Value, derived: bool) -> Shape:
        sizes = tensor.shape
        dims = value if isinstance(value, tuple) and len(value) == len(sizes) else ()
        if not dims:
            return tuple(self.axes.new(size, opaque=derived) for size in sizes)
        return tuple(
            dim if agree(dim.size, size) else self.axes.new(size, opaque=derived)
            for dim, size in zip(dims, sizes, strict=True)
        )

    def _unknown(self, node: fx.Node) -> Value:
        tensor = tensor_of(node)
        if tensor is None:
            return None
        return tuple(self.axes.new(size) for size in tensor.shape)


def _body(gm: fx.GraphModule, item: Any) -> fx.GraphModule | None:
    if not isinstance(item, fx.Node) or item.op != "get_attr":
        return None
    owner: Any = gm
    for part in str(item.target).split("."):
        owner = getattr(owner, part, None)
    return owner if isinstance(owner, fx.GraphModule) else None


def _is_operand(item: Any) -> bool:
    return not isinstance(item, str)
