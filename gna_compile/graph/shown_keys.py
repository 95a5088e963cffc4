"""Which keys a boolean mask shows whatever its inputs are: a proof that it hides padded text alone.

    cat([text_mask, ones(n)], 1)[:, None, None]      the last n keys are always shown

Every element is followed through what the mask is made of. A boolean is True if it always is, else
False, which stands for "it depends". A number that depends is NaN. What is not known to keep this
meaning makes all of its result depend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gna_compile.graph.nodes import operator_name, tensor_of
from gna_compile.graph.tokens.constants import FixedEvaluation, Unknown

_MOVES = frozenset(
    {
        *("cat", "stack", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t"),
        *("unsqueeze", "squeeze", "expand", "repeat", "getitem", "narrow", "select", "contiguous"),
        *("clone", "movedim", "pad"),
    }
)
# More True in their operands makes more True in their result.
_OF_BOOLEANS = frozenset(
    {"and", "or", "bitwise_and", "bitwise_or", "logical_and", "logical_or", "mul"}
)
# NaN makes NaN, or False.
_OF_NUMBERS = frozenset({"mul", "eq", "lt", "le", "gt", "ge"})
_CASTS = frozenset({"to", "bool", "float", "int", "long", "half", "bfloat16"})


def shown_keys(mask: fx.Node) -> torch.Tensor | None:
    """For each key, whether a boolean mask [..., keys] shows it to all queries of all batch entries.

    Returns:
        bool [keys], True only where that is so for all inputs; None if sizes are symbolic.
    """
    tensor = tensor_of(mask)
    if tensor is None or tensor.dtype != torch.bool or not _is_static(tensor):
        return None
    try:
        value = _Shown().value(mask)
    except Exception:  # whatever an operator raises: nothing is known then
        return None
    return value.reshape(-1, value.shape[-1]).all(0)


class _Shown(FixedEvaluation):
    """Follows what an input has a part in; all else keeps its values."""

    def __init__(self) -> None:
        super().__init__()
        self._fixed = FixedEvaluation()

    def value(self, node: fx.Node) -> Any:
        if node not in self._known:
            fixed = self._fixed.of(node)
            self._known[node] = self._depending(node) if fixed is None else fixed
        return self._known[node]

    def _depending(self, node: fx.Node) -> Any:
        tensor = tensor_of(node)
        if tensor is None or not _is_static(tensor) or tensor.numel() > self.most_elements:
            raise Unknown
        value = None
        if node.op in ("call_function", "call_method") and not self.is_written(node):
            try:
                value = self._followed(node, tensor)
            except Exception:  # whatever an operator raises: it depends, then
                value = None
        return _depends(tensor) if value is None or value.shape != tensor.shape else value

    def _followed(self, node: fx.Node, tensor: torch.Tensor) -> torch.Tensor | None:
        """The result of an operator; None if nothing is known of it."""
        name = operator_name(node)
        kinds = {t.dtype for link in node.all_input_nodes if (t := tensor_of(link)) is not None}
        are_boolean = {kind == torch.bool for kind in kinds}
        if name in _CASTS:
            return _cast(self.value(node.all_input_nodes[0]), tensor.dtype)
        if name in _MOVES:
            is_known = kinds == {tensor.dtype}  # or it is seen as other numbers
        elif are_boolean == {True}:
            is_known = name in _OF_BOOLEANS and tensor.dtype == torch.bool
        else:
            # Other numbers than these two may be rounded to one of them.
            numbers = [arg for arg in node.args if not isinstance(arg, fx.Node)]
            is_known = are_boolean == {False} and name in _OF_NUMBERS
            is_known &= all(type(n) in (int, float) and n in (0, 1) for n in numbers)
        if not is_known:
            return None
        result = self._computed(node, name, tensor)
        return _plain(result) if isinstance(result, torch.Tensor) else None


def _depends(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.bool:
        return torch.zeros(tensor.shape, dtype=torch.bool)
    return torch.full(tensor.shape, torch.nan)


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype != torch.bool:
        return torch.where(value, 1.0, torch.nan) if value.dtype == torch.bool else _plain(value)
    return value if value.dtype == torch.bool else (value != 0) & ~value.isnan()


def _plain(value: torch.Tensor) -> torch.Tensor:
    """Numbers that no rounding changes; of all others nothing is known."""
    if value.dtype == torch.bool:
        return value
    return torch.where((value == 0) | (value == 1), value.to(torch.float64), torch.nan)


def _is_static(tensor: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in tensor.shape)
