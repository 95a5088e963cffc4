"""Which tensors of a graph share memory, and which views of one tensor do not overlap."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gna_compile import _torch
from gna_compile.graph.mutation import written_by
from gna_compile.graph.nodes import operator_name, tensor_of

# Views in which one element of memory may be several of the tensor.
OVERLAPPING = frozenset(
    {*("expand", "expand_as", "broadcast_to", "broadcast_tensors", "unfold", "as_strided")}
)

# Views that can be looked at anew once what they are of has changed.
VIEWS = frozenset(
    {
        *("view", "reshape", "flatten", "ravel", "unflatten", "permute", "transpose", "t", "T"),
        *("mT", "unsqueeze", "squeeze", "expand", "chunk", "split", "unbind", "select", "narrow"),
        *("getitem", "movedim", "detach", "view_as", "contiguous", "to", "H", "mH"),
        *("data", "real", "imag"),
        *("split_with_sizes", "tensor_split", "expand_as", "reshape_as", "view_as_real"),
        *("view_as_complex", "unfold", "swapaxes", "alias", "float", "type"),
    }
)


def storages(node: fx.Node) -> list[Any]:
    """What tells which tensors share memory."""
    example = node.meta.get("example_value")
    items = example if isinstance(example, list | tuple) else [example]
    found = []
    for item in items:
        if isinstance(item, torch.Tensor):
            try:
                found.append(_torch.storage_key(item))
            except (NotImplementedError, RuntimeError):  # functorch, subclasses: may be any
                found.append(None)
    return list(dict.fromkeys(found))


def views_up(node: fx.Node) -> list[fx.Node]:
    """A node and the nodes that it is a view of, nearest first."""
    chain = [node]
    while chain[-1].op in ("call_function", "call_method"):
        above = chain[-1].args[0] if chain[-1].args else None
        if not isinstance(above, fx.Node) or not set(storages(above)) & set(storages(chain[-1])):
            break
        chain.append(above)
    return chain


def are_apart(one: list[fx.Node], other: list[fx.Node]) -> bool:
    """Whether two views are different pieces of one tensor."""
    shared = set(one) & set(other)
    if not shared:
        return False
    first, second = (
        next((chain[i - 1] for i, n in enumerate(chain) if n in shared and i), None)
        for chain in (one, other)
    )
    if first is None or second is None or first is second:
        return False
    if any(operator_name(node) in OVERLAPPING for node in one[one.index(first) + 1 :]):
        return False
    if operator_name(first) != "getitem" or operator_name(second) != "getitem":
        return False
    a, b = first.args[1], second.args[1]
    if isinstance(a, int) and isinstance(b, int):
        return a != b and (a < 0) == (b < 0)
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return any(
            isinstance(x, int)
            and isinstance(y, int)
            and x != y
            and (x < 0) == (y < 0)
            and a[:i] == b[:i]
            and all(p == slice(None) for p in a[:i])
            for i, (x, y) in enumerate(zip(a, b, strict=True))
        )
    return False


def written_in_body(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, ...]:
    """Operands of a higher-order operator that its bodies write to; all of them if unclear."""
    bodies = [body for item in node.args if (body := body_of(gm, item)) is not None]
    for body in bodies:
        inputs = set()
        for storage in (s for n in body.graph.find_nodes(op="placeholder") for s in storages(n)):
            inputs.add(storage)
        for inner in body.graph.nodes:
            for target in written_by(inner):
                if inputs & set(storages(target)):
                    return tuple(n for n in node.all_input_nodes if tensor_of(n) is not None)
    return ()


def body_of(gm: fx.GraphModule, item: Any) -> fx.GraphModule | None:
    if not isinstance(item, fx.Node) or item.op != "get_attr":
        return None
    owner: Any = gm
    for part in str(item.target).split("."):
        owner = getattr(owner, part, None)
    return owner if isinstance(owner, fx.GraphModule) else None
