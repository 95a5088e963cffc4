"""What is known at compile time about the values in a Dynamo graph, without adding guards unasked."""

from __future__ import annotations

import inspect
import math
import operator
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils._sympy.symbol import SymT, symbol_is_type

Size = int | torch.SymInt


def tensor_of(node: Any) -> torch.Tensor | None:
    """The (fake) tensor that `node` evaluates to, or None if it is no tensor or not recorded."""
    if not isinstance(node, fx.Node):
        return None
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether the condition holds for all sizes that the graph serves; adds no guard."""
    return statically_known_true(condition)


def holds(condition: bool | torch.SymBool) -> bool:
    """Whether the condition holds for these sizes; a guard makes Dynamo recompile for others.

    A condition on data-dependent sizes counts as false.
    """
    if isinstance(condition, bool):
        return condition
    if free_unbacked_symbols(condition):
        return statically_known_true(condition)
    return bool(condition)


def hint(size: Size) -> int:
    """The size of the example input that a symbol stands for; for reports and choices, not graphs."""
    return size if isinstance(size, int) else size.node.hint


def entry_of(
    symbol: sympy.Expr, placeholders: Iterable[fx.Node]
) -> tuple[fx.Node, int | None] | None:
    """The input that is this symbol, or the tensor and its axis of that size; None if none is."""
    tensors = []
    for node in placeholders:
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return node, None
        if isinstance(value, torch.Tensor):
            tensors.append((node, value))
    for node, tensor in tensors:
        for axis, length in enumerate(tensor.shape):
            if isinstance(length, torch.SymInt) and length.node.expr == symbol:
                return node, axis
    return None


def enters(size: Size, graph: fx.Graph) -> bool:
    """Whether a size can be computed from what enters a graph."""
    if isinstance(size, int):
        return True
    placeholders = graph.find_nodes(op="placeholder")
    return all(entry_of(symbol, placeholders) for symbol in size.node.expr.free_symbols)


def same_shape(left: Any, right: Any) -> bool:
    """Whether two shapes are equal for all sizes that the graph serves; adds no guard."""
    return len(left) == len(right) and all(
        is_known(one == other) for one, other in zip(left, right, strict=True)
    )


def is_unbacked(value: torch.Tensor) -> bool:
    """Whether a size of the tensor depends on data."""
    return bool(free_unbacked_symbols(value.shape))


def number(argument: Any, *, pin: bool = True) -> float | None:
    """The one value of a scalar argument, or None if it has none at compile time.

    A Python number is itself. A float that Dynamo keeps symbolic (an argument or attribute under
    `dynamic=True`) is pinned, if `pin` allows: the guard makes another value recompile. A value
    computed from symbolic sizes is None, since pinning it would pin those sizes.
    """
    if isinstance(argument, fx.Node):
        argument = argument.meta.get("example_value")
    if isinstance(argument, bool):
        return None
    if isinstance(argument, int | float):
        return float(argument)
    if not isinstance(argument, torch.SymInt | torch.SymFloat):
        return None
    expression = argument.node.expr
    if expression.is_number:
        return float(expression)
    if pin and isinstance(argument, torch.SymFloat) and _is_float_input(expression):
        return float(argument)
    return None


def constant(argument: Any, *, pin: bool = True) -> float | None:
    """Like `number`, and also the value of a one-element tensor that the graph makes of a literal."""
    value = number(argument, pin=pin)
    tensor = tensor_of(argument)
    if value is not None or tensor is None or tensor.dim() != 0:
        return value
    if any(operator_name(user) not in ("mul", "div", "sqrt") for user in argument.users):
        return None  # it may be changed, or seen through a view
    if any(argument in written_by(user) for user in argument.users):
        return None
    name = operator_name(argument)
    if name == "full":
        value = number(argument_of(argument, 1, "fill_value"), pin=pin)
    elif name in ("tensor", "scalar_tensor"):
        value = number(argument_of(argument, 0, "data", "s"), pin=pin)
    elif name == "sqrt":
        value = constant(argument_of(argument, 0, "input", "self"), pin=pin)
        value = math.sqrt(value) if value is not None and value >= 0 else None
    if value is None or tensor.dtype in (torch.float32, torch.float64):
        return value
    # A half-precision constant is rounded; take it only where eight bits of mantissa hold it.
    exact = (math.frexp(value)[0] * 256).is_integer()
    return value if exact and tensor.dtype in (torch.float16, torch.bfloat16) else None


def argument_of(node: fx.Node, index: int, *names: str, default: Any = None) -> Any:
    """An argument of a call by position or by any of its names, else `default`."""
    if index < len(node.args):
        return node.args[index]
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    return default


# Operators whose Python name is not their name in torch, and synonyms: what the rest of this
# package calls them.
_NAMES = {
    "bmm": "matmul",
    "linalg_matmul": "matmul",
    "__matmul__": "matmul",
    "multiply": "mul",
    "imul": "mul",
    "__mul__": "mul",
    "__rmul__": "mul",
    "true_divide": "div",
    "divide": "div",
    "truediv": "div",
    "itruediv": "div",
    "__truediv__": "div",
    "iadd": "add",
    "__add__": "add",
    "__radd__": "add",
    "isub": "sub",
    "subtract": "sub",
    "__sub__": "sub",
    "_softmax": "softmax",
    "special_softmax": "softmax",
    "_to_copy": "to",
    "swapaxes": "transpose",
    "swapdims": "transpose",
}
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


def operator_name(node: fx.Node) -> str:
    """One name for a torch operator however it is called; "" for anything else.

    A function (`torch.softmax`, `torch.nn.functional.softmax`), a Tensor method, a Python operator
    and an `aten` overload share their name; so do in-place forms (`add_`), which `written_by`
    tells apart.
    """
    name = ""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            target = target.overloadpacket
        if isinstance(target, torch._ops.OpOverloadPacket):
            namespace, _, aten = target._qualified_op_name.partition("::")
            name = aten if namespace == "aten" else ""
        elif (getattr(target, "__module__", None) or "").split(".")[0] in (
            "torch",
            "_operator",
            "builtins",
        ):
            name = getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _NAMES.get(name, name)


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
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return [
            node.kwargs.get("out"),
            *(argument_of(node, place, name) for place, name in _written_arguments(target)),
        ]
    if isinstance(target, torch._ops.HigherOrderOperator):
        # Its bodies are operands too, but no tensors.
        operands = [item for item in node.all_input_nodes if tensor_of(item) is not None]
        return operands if _writes_operands(node, target) else ()
    if node.op == "call_module":
        owner = node.graph.owning_module
        modules = [] if owner is None else list(owner.get_submodule(str(target)).modules())
        harmless = modules and not any(getattr(m, "inplace", False) for m in modules)
        return () if harmless else node.all_input_nodes
    name = str(target) if node.op == "call_method" else getattr(target, "__name__", "")
    in_place = target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
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


def _writes_operands(node: fx.Node, target: torch._ops.HigherOrderOperator) -> bool:
    """Whether a higher-order operator changes its operands, or one of its bodies does."""
    if "mutation" in target._name:  # a user's Triton kernel: any of its tensors
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
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
    written = {
        (sys.maxsize if argument.kwarg_only else position, argument.name): None
        for overload in overloads
        for position, argument in enumerate(overload._schema.arguments)
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
        return one.untyped_storage()._cdata == other.untyped_storage()._cdata
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


def _is_float_input(expression: Any) -> bool:
    return all(symbol_is_type(symbol, SymT.FLOAT) for symbol in expression.free_symbols)
