"""The native module (csrc/bindings.cpp). Tensors are (address, strides in elements)."""

from collections.abc import Sequence

_Tensor = tuple[int, Sequence[int]]
_Group = tuple[int, int, int, bool]

class Pattern:
    """A segment is a number of global tokens, or the axes of a grid.

    An axis is (length, begin, end, log2_box, window, stride, dilation, causal).
    """

    def __init__(
        self,
        *,
        queries: Sequence[int | Sequence[tuple[int, ...]]],
        keys: Sequence[int | Sequence[tuple[int, ...]]],
        links: Sequence[int],
    ) -> None: ...
    def streamed(
        self, of_keys: bool, segment: int, axis: int, log2_box: int, /
    ) -> tuple[int, list[int]]: ...

class Problem:
    def __init__(
        self,
        *,
        type: int,
        sizes: tuple[int, int, int, int],
        pattern: Pattern,
        scale: float,
        key_mask: _Tensor | None,
        threads: int,
        isa: str,
    ) -> None: ...

def forward(
    problem: Problem,
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    output: _Tensor,
    logsumexp: int,
    /,
) -> None: ...
def backward(
    problem: Problem,
    grad_output: _Tensor,
    grad_logsumexp: _Tensor | None,
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    output: _Tensor,
    logsumexp: int,
    grad_query: _Tensor,
    grad_key: _Tensor,
    grad_value: _Tensor,
    /,
) -> None: ...
def isas() -> list[str]: ...
def group_length(length: int, dilation: int, group: int, /) -> int: ...
def keys_of(axis: _Group, query: int, /) -> tuple[int, int]: ...
def union_of(axis: _Group, begin: int, end: int, /) -> tuple[int, int]: ...
def intersection_of(axis: _Group, begin: int, end: int, /) -> tuple[int, int]: ...
def seen_by(axis: _Group, begin: int, end: int, /) -> tuple[int, int]: ...
def all_seen_by(axis: _Group, begin: int, end: int, /) -> tuple[int, int]: ...
def axis_bits(begin: int, end: int, log2_inner: int, log2_extent: int, word: int, /) -> int: ...
