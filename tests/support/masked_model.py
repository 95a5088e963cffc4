"""The model-level oracle: a model in eager mode whose chosen attentions get a boolean mask.

    with masked(model, {"blocks.*.attn1": oracle.mask(grid, window)}) as calls:
        expected = model(**inputs)

Every `scaled_dot_product_attention` that runs inside is seen, however the model spells it, with the
name of the module that it runs in. Unfused attention (matmul and softmax) is not: compare such
a model with its fused twin (`models.build(..., written_out=False)`), which has the same weights.

`layout_masks` makes the masks of a window from layouts that are known, as in `models.TRUE_LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass
class Call:
    """One attention that ran.

    Attributes:
        index: how many ran before it.
        layer: fully qualified name of the innermost module, "" for the model itself.
        query, key: shapes, [..., tokens, head_dim].
        masked: whether a mask was added.
        tensors: query, key and value while the mask is being chosen, then None.
    """

    index: int
    layer: str
    query: torch.Size
    key: torch.Size
    masked: bool = False
    tensors: tuple[Tensor, Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def is_self(self) -> bool:
        """Whether there are as many keys as queries."""
        return self.query[-2] == self.key[-2]


Choice = Callable[[Call], Tensor | None]


@contextmanager
def masked(model: nn.Module, masks: Mapping[str, Tensor] | Choice) -> Iterator[list[Call]]:
    """Adds masks to the attentions that `model` runs within the context.

    Args:
        model: run it in eager mode.
        masks: bool [queries, keys], True where a query sees a key, by a glob on the layer's name
            (the first that matches counts); or a function of the call that gives a mask or None. A
            mask is combined with the one that the model itself gives.

    Yields:
        All attentions so far, in order.

    Raises:
        ValueError: when a mask does not have the shape of its attention, and at the end when a glob
            matched no attention.
    """
    unused = set() if callable(masks) else set(masks)

    def choose(call: Call) -> Tensor | None:
        if callable(masks):
            return masks(call)
        for pattern, mask in masks.items():
            if fnmatchcase(call.layer, pattern):
                unused.discard(pattern)
                return mask
        return None

    calls: list[Call] = []
    with _names_of_running_modules(model) as running, _MaskSdpa(running, choose, calls):
        yield calls
    if unused:
        layers = sorted({call.layer for call in calls})
        raise ValueError(f"no attention ran in {sorted(unused)}, only in {layers}")


def attention_calls(model: nn.Module, inputs: dict[str, Any]) -> list[Call]:
    """The attentions that one forward call runs."""
    with torch.no_grad(), masked(model, lambda call: None) as calls:
        model(**inputs)
    return calls


def parse_layout(layout: str) -> tuple[int, tuple[int, ...], int]:
    """Tokens before the grid, the grid and tokens behind it, of a text like "14 + 5x6x8".

    A number alone is a grid of one axis.
    """
    parts = layout.split(" + ")
    index = next((i for i, part in enumerate(parts) if "x" in part), 0)
    if "x" not in parts[index] and (len(parts) > 1 or not layout):
        raise ValueError(f"no grid in {layout!r}")
    before, after = (sum(map(int, others)) for others in (parts[:index], parts[index + 1 :]))
    return before, tuple(map(int, parts[index].split("x"))), after


def segments_of(layout: str) -> list[int | tuple[int, ...]]:
    """The segments of a text like "14 + 8x10 + 6x5": tokens of no place, and grids."""
    if "x" not in layout:
        return list(parse_layout(layout)[1:2])
    return [
        tuple(map(int, part.split("x"))) if "x" in part else int(part)
        for part in layout.split(" + ")
    ]


def layout_mask(
    layout: str, windows: Sequence[Sequence[int] | None], strides: Sequence[Any] | None = None
) -> Tensor:
    """Bool [tokens, tokens]: the mask of a window on each grid of a layout, None for a full one."""
    segments = segments_of(layout)
    sizes = [segment if isinstance(segment, int) else prod(segment) for segment in segments]
    see = torch.ones(sum(sizes), sum(sizes), dtype=torch.bool)
    rest = zip(windows, strides or [None] * len(windows), strict=True)
    start = 0
    for segment, size in zip(segments, sizes, strict=True):
        if not isinstance(segment, int):
            window, stride = next(rest)
            here = slice(start, start + size)
            if window is not None:
                see[here, here] = oracle.mask(segment, window, stride)
        start += size
    return see


def layout_masks(
    layouts: Sequence[str],
    window: Callable[[tuple[int, ...]], Sequence[int] | None],
    stride: Callable[[tuple[int, ...]], Sequence[int]] | None = None,
) -> Choice:
    """A choice for `masked`: the same kind of window in every self-attention that has a grid.

    Args:
        layouts: of all self-attentions of one forward call in their order, "" for one without a
            grid; a following call starts again at the first.
        window: from a grid to its window, None for no mask.
        stride: from a grid to its stride, by default 1.
    """
    ran = 0

    def choose(call: Call) -> Tensor | None:
        nonlocal ran
        if not call.is_self:
            return None
        layout = layouts[ran % len(layouts)]
        ran += 1
        if not layout:
            return None
        grids = [segment for segment in segments_of(layout) if not isinstance(segment, int)]
        windows = [window(grid) for grid in grids]
        if all(size is None for size in windows):
            return None
        return layout_mask(layout, windows, [stride(grid) for grid in grids] if stride else None)

    return choose


@contextmanager
def _names_of_running_modules(model: nn.Module) -> Iterator[list[str]]:
    """The fully qualified names of the modules whose forward is running, outermost first."""
    running: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(
            module.register_forward_hook(lambda *_: void(running.pop()), always_call=True)
        )
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def void(_: object) -> None:
    """Forward hooks must return None, or their value becomes the module's output."""


class _MaskSdpa(TorchFunctionMode):
    def __init__(self, running: list[str], choose: Choice, calls: list[Call]) -> None:
        super().__init__()
        self.running, self.choose, self.calls = running, choose, calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self.attend(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **rest: Any,
    ) -> Tensor:
        layer = self.running[-1] if self.running else ""
        call = Call(len(self.calls), layer, query.shape, key.shape)
        self.calls.append(call)
        call.tensors = query, key, value
        mask = self.choose(call)
        call.tensors = None
        if mask is not None:
            wanted = (query.shape[-2], key.shape[-2])
            if tuple(mask.shape) != wanted:
                raise ValueError(
                    f"the mask for {layer!r} is {tuple(mask.shape)}, its attention {wanted}"
                )
            call.masked = True
            mask = mask.to(query.device)
            if is_causal:
                mask, is_causal = mask.tril(), False
            if attn_mask is None:
                attn_mask = mask
            elif attn_mask.dtype == torch.bool:
                attn_mask = attn_mask & mask
            else:
                attn_mask = attn_mask.masked_fill(~mask, float("-inf"))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, **rest
        )
