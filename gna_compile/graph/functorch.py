"""`torch.func` in a Dynamo graph: which transforms are open at a node, and what their tensors wrap.

Dynamo writes `vmap`, `grad` and `jvp` out: a call opens a level and another one closes it, and in
between tensors are wrappers. `vmap` takes a dimension of a tensor away with `_add_batch_dim`, and
gives it back with `_remove_batch_dim`. Shapes, strides and operators in between are those of one
sample, and so is an attention site.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, fx

from gna_compile import _torch
from gna_compile.graph.nodes import operator_name, tensor_of
from gna_compile.reasons import Decline, Reason

__all__ = [
    "ADD_BATCH_DIM",
    "REMOVE_BATCH_DIM",
    "SAME",
    "UNPACK_DUAL",
    "Levels",
    "is_sample",
    "may_be_trained",
    "plain",
    "samples_as_batch",
    "stand_in",
]

_KINDS = {"vmap": ("enter_vmap", "leave_vmap"), "grad": ("enter_grad", "leave_grad")}
_KINDS["jvp"] = ("enter_jvp", "leave_jvp")
_OPEN = {_torch.called(first): kind for kind, (first, _) in _KINDS.items()}
_CLOSE = {_torch.called(last): kind for kind, (_, last) in _KINDS.items()}
ADD_BATCH_DIM = _torch.called("add_batch_dim")
REMOVE_BATCH_DIM = _torch.called("remove_batch_dim")
UNPACK_DUAL = _torch.called("unpack_dual")
SAME = frozenset(
    map(
        _torch.called,
        ("wrap_for_grad", "unwrap_for_grad", "set_tensor_requires_grad", "make_dual"),
    )
)
"""Calls whose result has the elements of their first operand."""


class Levels:
    """The transforms that are open as a graph is walked in order.

    Attributes:
        kinds: "vmap", "grad" or "jvp", outermost first; the level of the first is 1.
        is_odd: a call named a level that is not the innermost one.
    """

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.is_odd = False

    def visit(self, node: fx.Node) -> str | None:
        """Opens or closes a level; returns the name of a call of `torch.func`, else None."""
        if node.op != "call_function":
            return None
        name = operator_name(node)
        if name in _OPEN:
            self.kinds.append(_OPEN[name])
        elif name in _CLOSE:
            if not self.kinds or self.kinds.pop() != _CLOSE[name]:
                self.is_odd = True
        elif name in (ADD_BATCH_DIM, REMOVE_BATCH_DIM):
            level = node.args[2 if name == ADD_BATCH_DIM else 1]
            if level != len(self.kinds) or self.kinds[-1:] != ["vmap"]:
                self.is_odd = True
        elif name not in SAME and name != UNPACK_DUAL:
            return None
        return name

    def obstacle(self, tensors: Iterable[Tensor], is_trained: bool) -> Decline | None:
        """Why an attention of these operands and this output cannot be rewritten here, or None.

        Args:
            is_trained: the graph's results may be differentiated once more, outside of it.
        """
        derivatives = len(self.kinds) - self.kinds.count("vmap")
        if derivatives > 1 or (derivatives and is_trained):
            outside = ", and the graph has inputs that require gradients" * (derivatives == 1)
            return Decline(
                Reason.SECOND_DERIVATIVE, f"it is inside {' of '.join(self.kinds)}{outside}"
            )
        open_here = {i + 1 for i, kind in enumerate(self.kinds) if kind == "vmap"}
        if self.is_odd or any(_vmap_levels(tensor) - open_here for tensor in tensors):
            return Decline(Reason.SHAPE, "it is inside a vmap that does not begin in this graph")
        return None


def may_be_trained(gm: fx.GraphModule) -> bool:
    """Whether AOTAutograd will make a backward graph for a graph that is compiled now."""
    inputs = map(tensor_of, gm.graph.find_nodes(op="placeholder"))
    return torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (*inputs, *gm.parameters()) if tensor is not None
    )


def plain(tensor: Tensor) -> Tensor | None:
    """The fake tensor itself or inside wrappers of `torch.func`; None for any other subclass.

    Raises:
        Missing: if this torch does not tell what a wrapper wraps.
    """
    if not isinstance(tensor, _torch.FakeTensor):
        _torch.require("torch.func")
        tensor = _torch.innermost(tensor)
    return tensor if isinstance(tensor, _torch.FakeTensor) else None


def stand_in(tensor: Tensor) -> Tensor:
    """A plain fake tensor with the sizes and strides that a wrapper shows to one sample."""
    inside = plain(tensor)
    if inside is None or inside is tensor:
        return tensor
    with _torch.fake_mode(inside), torch.no_grad():
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )


def is_sample(tensor: Tensor) -> bool:
    """Whether `vmap` gives a tensor another value for each sample."""
    return bool(_vmap_levels(tensor))


def _vmap_levels(tensor: Tensor) -> set[int]:
    """The levels of `vmap` that a tensor has another value for each sample of."""
    levels = set()
    while not isinstance(tensor, _torch.FakeTensor) and _torch.is_wrapped(tensor):
        if _torch.is_batched(tensor):
            levels.add(_torch.batch_level(tensor))
        tensor = _torch.unwrapped(tensor)
    return levels


def samples_as_batch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Real tensors with the samples of all `vmap`s around them as part of their first dimension."""
    if _torch.why_not("torch.func") or not any(map(_torch.is_wrapped, tensors)):
        return list(tensors)
    laid = [_laid_open(tensor) for tensor in tensors]
    sizes = {level: size for _, levels in laid for level, size in levels}
    result = []
    for tensor, levels in laid:
        own = dict(levels)
        for place, level in enumerate(sorted(sizes)):
            if level not in own:
                tensor = tensor.unsqueeze(place)
        shape = [sizes[level] for level in sorted(sizes)]
        tensor = tensor.expand(*shape, *tensor.shape[len(shape) :])
        result.append(tensor.flatten(0, len(shape)))
    return result


def _laid_open(tensor: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """What lies inside all wrappers, the dimensions of samples first, by level; levels and sizes."""
    if not _torch.is_wrapped(tensor):
        return tensor.detach(), []
    inside, levels = _laid_open(_torch.unwrapped(tensor))
    if not _torch.is_batched(tensor):
        return inside, levels
    count = len(levels)
    inside = inside.movedim(count + _torch.batch_dim(tensor), count)
    levels = [*levels, (_torch.batch_level(tensor), inside.shape[count])]
    assert all(one < other for (one, _), (other, _) in pairwise(levels))
    return inside, levels
