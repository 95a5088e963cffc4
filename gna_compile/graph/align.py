"""Which dimensions before a reshape make up which dimensions after it.

A reshape keeps row-major order, so input and output dimensions correspond wherever products of the
sizes agree. `align_products` cuts both shapes at every such place. Sizes are *keys*: ints, or the
expressions behind symbolic sizes, which are only equal if they are for every input.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import add, mul
from typing import Any
from zlib import crc32

from sympy import Integer

from gna_compile.graph.values import Size

Key = Any
"""An int, or the sympy expression behind a symbolic size."""

Group = tuple[tuple[int, ...], tuple[int, ...]]
"""Positions before, and positions after: the former's sizes multiply (or add) up to the latter's."""


def key_of(size: Size) -> Key:
    """What to compare a size by: an int, or its expression."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else expression


def same_key(left: Key, right: Key) -> bool:
    """Whether two sizes are equal whatever the symbols stand for, as far as algebra shows."""
    if left is right:
        return True
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return left == right or _same_expression(left, right)


@lru_cache(maxsize=4096)
def _same_expression(left: Key, right: Key) -> bool:
    if _at_a_point(left) != _at_a_point(right):
        return False  # algebra is slow, and nearly all that is asked about differs
    return bool((left - right).expand() == 0)


@lru_cache(maxsize=4096)
def _at_a_point(key: Key) -> Key:
    """The value of an expression where every symbol is a number of its own."""
    if isinstance(key, int):
        return key
    return key.xreplace({s: Integer(97 + crc32(s.name.encode()) % 997) for s in key.free_symbols})


def agree(left: Size, right: Size) -> bool:
    """Whether two sizes that must be equal can be: unlike `same_key`, this is no proof.

    A size known when compiling agrees with nothing but itself; symbols agree if they stand for
    equal sizes of the example inputs. For two operands of one operator that is enough, since the
    operator fails, or Dynamo guards, where they differ.
    """
    if left is right:
        return True
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    if same_key(key_of(left), key_of(right)):
        return True
    hints = [size if isinstance(size, int) else size.node.hint for size in (left, right)]
    return hints[0] is not None and bool(hints[0] == hints[1])


@lru_cache(maxsize=4096)
def align_products(before: tuple[Key, ...], after: tuple[Key, ...]) -> tuple[Group, ...]:
    """The finest groups of dimensions, in order, whose products agree.

    Dimensions of size 1 carry no position, so they are a matter of convention: one on both sides
    at the same place is a group of its own; any other belongs to the group that follows it
    (a video of one frame, (1, H, W) -> (H * W)); one at the very end belongs to none.
    """
    return _align(before, after, mul, 1)


@lru_cache(maxsize=4096)
def align_sums(before: tuple[Key, ...], after: tuple[Key, ...]) -> tuple[Group, ...]:
    """The finest groups of segments, in order, whose lengths add up to the same."""
    return _align(before, after, add, 0)


def _align(
    before: Sequence[Key], after: Sequence[Key], combine: Any, neutral: int
) -> tuple[Group, ...]:
    groups: list[Group] = []
    i = j = 0
    while i < len(before) or j < len(after):
        first_i, first_j = i, j
        while i < len(before) and before[i] == neutral and not _at(after, j, neutral):
            i += 1
        while j < len(after) and after[j] == neutral and not _at(before, i, neutral):
            j += 1
        if i == len(before) or j == len(after):
            break
        stop_i, stop_j = _first_agreement(before, after, i, j, combine)
        groups.append((tuple(range(first_i, stop_i)), tuple(range(first_j, stop_j))))
        i, j = stop_i, stop_j
    return tuple(groups)


def _at(sizes: Sequence[Key], index: int, neutral: int) -> bool:
    return index < len(sizes) and bool(sizes[index] == neutral)


def _first_agreement(
    before: Sequence[Key], after: Sequence[Key], i: int, j: int, combine: Any
) -> tuple[int, int]:
    """Where the group that starts at i and j ends; the ends of both if nothing agrees earlier."""
    totals = []
    total = None
    for stop in range(j, len(after)):
        total = after[stop] if total is None else combine(total, after[stop])
        totals.append(total)
    total = None
    for stop in range(i, len(before)):
        total = before[stop] if total is None else combine(total, before[stop])
        for offset, other in enumerate(totals):
            if same_key(total, other):
                return stop + 1, j + offset + 1
    return len(before), len(after)


def product(sizes: Sequence[Size]) -> Size:
    """The product, symbolic if a factor is."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def is_compound(key: Key) -> bool:
    """Whether a size is computed from symbols, rather than being one or a number."""
    return not isinstance(key, int) and not key.is_Symbol


def is_zero(key: Key) -> bool:
    return bool(key == 0)


__all__ = [
    "Group",
    "Key",
    "agree",
    "align_products",
    "align_sums",
    "is_compound",
    "is_zero",
    "key_of",
    "product",
    "same_key",
]
