"""CuTe's layouts, as the PTX ISA writes them: "shape:stride", both nested, the first mode fastest."""

from __future__ import annotations

import ast
from typing import Any


def at(layout: str, *coordinates: int) -> int:
    """The offset of a coordinate, one int a top-level mode."""
    shapes, strides = (ast.literal_eval(part) for part in layout.split(":"))
    modes = zip(shapes, strides, coordinates, strict=True)
    return sum(offset(shape, stride, coordinate) for shape, stride, coordinate in modes)


def offset(shape: Any, stride: Any, coordinate: int) -> int:
    if isinstance(shape, int):
        assert coordinate < shape
        return int(stride * coordinate)
    result = 0
    for inner_shape, inner_stride in zip(shape, stride, strict=True):
        count = size(inner_shape)
        result += offset(inner_shape, inner_stride, coordinate % count)
        coordinate //= count
    assert coordinate == 0
    return result


def size(shape: Any) -> int:
    if isinstance(shape, int):
        return shape
    result = 1
    for part in shape:
        result *= size(part)
    return result


def swizzle(bits: int, base: int, shift: int, offset: int) -> int:
    """Swizzle<bits, base, shift>: bits from base + shift on are xored to those from base on."""
    for bit in range(bits):
        if offset >> base + shift + bit & 1:
            offset ^= 1 << base + bit
    return offset
