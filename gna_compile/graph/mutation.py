"""What the nodes of a graph write in place, and which tensors share memory."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Sequence
from functools import cache
from types import FunctionType
from typing import Any

from torch import fx

from gna_compile import _torch
from gna_compile.graph.nodes import argument_of, tensor_of

_IN_PLACE = frozenset(
    {
        operator.setitem,
        operator.iadd,
        operator.iand,
        operator.ifloordiv,
        operator.ilshift,
        operator.imatmul,
        operator.imod,
        operator.imul,
        operator.ior,
        operator.ipow,
        operator.irshift,
        operator.isub,
        operator.itruediv,
        operator.ixor,
    }
)


_NOT_IN_PLACE = frozenset({"__index__", "__init__", "__int__", "__invert__", "__iter__"})


# Functions of torch that keep statistics or renormalize in their arguments, which their name does
# not tell: the argument that says whether they do, and the positions and names of what they write.
_STATEFUL: dict[str, tuple[tuple[int, str], dict[int, str]]] = {
    "batch_norm": ((5, "training"), {1: "running_mean", 2: "running_var", 3: "", 4: ""}),
    "instance_norm": ((5, "use_input_stats"), {1: "running_mean", 2: "running_var", 3: "", 4: ""}),
    "embedding": ((3, "max_norm"), {1: "weight"}),
    "embedding_bag": ((3, "max_norm"), {0: "input", 1: "weight"}),
}


# Packages whose functions Dynamo calls without looking into them, and that write to nothing.
_PURE_PACKAGES = frozenset({"builtins", "einops", "math"})


def written_by(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors that a call changes in place (its first operand, or `out=`); () for most calls.

    Where that cannot be told, all of its operands.
    """
    if node.op not in ("call_function", "call_method", "call_module"):
        return ()
    flat = [
        item
        for group in _written(node)
        for item in (group if isinstance(group, list | tuple) else [group])
    ]
    return tuple(dict.fromkeys(item for item in flat if isinstance(item, fx.Node)))


def _written(node: fx.Node) -> Sequence[Any]:
    """What `written_by` says, in lists of arguments."""
    target = node.target
    if isinstance(target, (_torch.OpOverload, _torch.OpOverloadPacket)):
        return [
            node.kwargs.get("out"),
            *(argument_of(node, place, name) for place, name in _written_arguments(target)),
        ]
    if isinstance(target, _torch.HigherOrderOperator):
        # Its bodies are operands too, but no tensors.
        operands = [item for item in node.all_input_nodes if tensor_of(item) is not None]
        return operands if _writes_operands(node, target) else ()
    if node.op == "call_module":
        owner = node.graph.owning_module
        modules = [] if owner is None else list(owner.get_submodule(str(target)).modules())
        harmless = modules and not any(getattr(m, "inplace", False) for m in modules)
        return () if harmless else node.all_input_nodes
    name = str(target) if node.op == "call_method" else getattr(target, "__name__", "")
    is_operator = getattr(target, "__module__", "") == "_operator"  # of which `and_` is no `and`
    named_so = name.endswith("_") and not name.endswith("__") and not is_operator
    in_place = target in _IN_PLACE or named_so
    if node.op == "call_method":
        in_place |= name == "__setitem__" or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    else:
        module = getattr(getattr(target, "__objclass__", target), "__module__", None)
        package = (module or "").split(".")[0]
        if package not in ("torch", "_operator") and package not in _PURE_PACKAGES:
            return node.all_input_nodes
        position = _position_of_inplace(target)
        if position is not None:
            in_place |= argument_of(node, position, "inplace", default=False) is not False
    written: list[Any] = [node.kwargs.get("out")]
    if in_place:
        first = argument_of(node, 0, "input", "self")
        written.extend(node.all_input_nodes if first is None else [first])
    if name in _STATEFUL:
        (place, switch), arguments = _STATEFUL[name]
        default = name == "instance_norm"
        if argument_of(node, place, switch, default=default) not in (False, None):
            written.extend(argument_of(node, *argument) for argument in arguments.items())
    return written


@cache
def _position_of_inplace(target: Any) -> int | None:
    """Where a function of `torch.nn.functional` has its `inplace`, or None if it has none."""
    if not isinstance(target, FunctionType):
        return None
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else None


def _writes_operands(node: fx.Node, target: Any) -> bool:
    """Whether a higher-order operator changes its operands, or one of its bodies does."""
    if "mutation" in target.__name__:  # a user's Triton kernel: any of its tensors
        return True
    owner = node.graph.owning_module
    for argument in node.all_input_nodes:
        if argument.op != "get_attr":
            continue
        body: Any = owner
        for part in str(argument.target).split("."):
            body = getattr(body, part, None)
        if body is None or (isinstance(body, fx.GraphModule) and _writes_inputs(body.graph)):
            return True
    return False


def _writes_inputs(graph: fx.Graph) -> bool:
    inputs = [node for node in graph.find_nodes(op="placeholder") if tensor_of(node) is not None]
    return any(
        shares_memory(target, entry)
        for node in graph.nodes
        for target in written_by(node)
        for entry in inputs
    )


@cache
def _written_arguments(target: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operator, or an overload of it, writes to."""
    overloads = [target]
    if isinstance(target, _torch.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
    written = {
        (sys.maxsize if argument.kwarg_only else position, argument.name): None
        for overload in overloads
        for position, argument in enumerate(_torch.arguments(overload))
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    return tuple(written)


def shares_memory(left: fx.Node, right: fx.Node) -> bool:
    """Whether writing one of two tensors may change the other; True where that cannot be told."""
    if left is right:
        return True
    one, other = tensor_of(left), tensor_of(right)
    if one is None or other is None or _changes_storage(left) or _changes_storage(right):
        return True
    try:
        return bool(_torch.storage_key(one) == _torch.storage_key(other))
    except (NotImplementedError, RuntimeError):  # tensors without a storage: functorch, subclasses
        return True


def _changes_storage(node: fx.Node) -> bool:
    """Whether a tensor is given other memory at some time, of which what is recorded is the last."""
    return any(
        user.op == "call_method" and user.target == "set_" and user.args[:1] == (node,)
        for user in node.users
    )


_RESHAPING = frozenset(
    {
        "as_strided_",
        "resize_",
        "resize_as_",
        "set_",
        "squeeze_",
        "swapaxes_",
        "swapdims_",
        "t_",
        "transpose_",
        "unsqueeze_",
    }
)


def reshaped_in_place(graph: fx.Graph) -> list[fx.Node]:
    """The tensors that get another shape in place: what is recorded is the last that they had."""
    found: list[fx.Node] = []
    for node in graph.nodes:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        packet = getattr(node.target, "overloadpacket", None)
        if name in _RESHAPING or getattr(packet, "__name__", "") in _RESHAPING:
            found.extend(written_by(node))
    return found
