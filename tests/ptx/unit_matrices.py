"""Numbers, tensor maps and matrices in shared memory, for tests of the interpreter's units."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from ptx.unit_shim import aligned_bytes, call, pointer

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def floats(*x: float) -> Floats:
    return np.array(x, np.float32)


def coordinates(*x: int) -> npt.NDArray[np.int32]:
    return np.array(x, np.int32)


def to_float(bf16: bool, bits: npt.NDArray[np.uint16]) -> Floats:
    result = np.zeros(bits.shape, np.float32)
    call("unit_to_float", bf16, bits, result, bits.size)
    return result


def from_float(bf16: bool, x: Floats) -> npt.NDArray[np.uint16]:
    result = np.zeros(x.shape, np.uint16)
    call("unit_from_float", bf16, np.ascontiguousarray(x), result, x.size)
    return result


def rounded(bf16: bool, x: npt.NDArray[Any]) -> Floats:
    return to_float(bf16, from_float(bf16, x.astype(np.float32)))


def close(actual: Floats, expected: npt.NDArray[np.float64]) -> None:
    """Up to the rounding of one sum."""
    np.testing.assert_array_max_ulp(actual, expected.astype(np.float32), 1)


# Tensor maps --------------------------------------------------------------------------------------


@dataclass
class Map:
    """The arguments of cuTensorMapEncodeTiled, innermost first, and the map made of them."""

    extents: list[int]
    strides: list[int]
    box: list[int]
    steps: list[int] = field(default_factory=list)
    address: int = 0
    type: int = 0
    interleave: int = 0
    swizzle: int = 0
    promotion: int = 0
    fill: int = 0
    rank: int | None = None

    def encode(self) -> int:
        self.map = aligned_bytes(128, 64)
        why = np.zeros(1, np.uint64)
        rank = len(self.extents) if self.rank is None else self.rank
        result = call(
            "unit_encode",
            self.map,
            self.type,
            rank,
            self.address,
            np.array(self.extents, np.uint64),
            np.array([*self.strides, 0], np.uint64),
            np.array(self.box, np.uint32),
            np.array(self.steps or [1] * len(self.box), np.uint32),
            self.interleave,
            self.swizzle,
            self.promotion,
            self.fill,
            why,
        )
        assert isinstance(result, int)
        return result


def load(matrix: npt.NDArray[np.uint16], rows: int, shared: Bytes, to: int) -> None:
    """Rows of a matrix in boxes of 64 columns, as the kernels load queries, keys and values."""
    height, width = matrix.shape
    box = Map([width, height], [2 * width], [64, rows], type=9, swizzle=3, address=pointer(matrix))
    assert box.encode() == 0
    for number in range(width // 64):
        at = coordinates(64 * number, 0)
        call("unit_load_box", box.map, at, shared, shared.size, to + number * rows * 128)


# Matrices in shared memory ------------------------------------------------------------------------


def descriptor(sm: int, start: int, leading: int, stride: int, span: int) -> int:
    """By the tables "Matrix descriptor format" (wgmma) and "Shared memory descriptor" (tcgen05)."""
    bits = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32
    if sm == 90:
        return bits | {16: 0, 128: 1, 64: 2, 32: 3}[span] << 62
    return bits | 1 << 46 | {16: 0, 128: 2, 64: 4, 32: 6}[span] << 61


def addresses(
    sm: int, bits: int, mn_major: bool, rows: int, columns: int = 16, element_bytes: int = 2
) -> npt.NDArray[np.uint32]:
    result = np.zeros((rows, columns), np.uint32)
    call("unit_smem_addresses", sm, bits, mn_major, rows, columns, element_bytes, result)
    return result


@dataclass
class Operand:
    """A random 16-bit matrix, rows x 16, laid out in shared memory for a descriptor."""

    rng: np.random.Generator
    sm: int
    rows: int
    bf16: bool
    mn_major: bool
    span: int
    start: int
    shared: Bytes

    def __post_init__(self) -> None:
        unit = 8 * self.span if self.span > 16 else 128
        atoms = -(-2 * self.rows // self.span) if self.mn_major else self.rows // 8
        # No two parts of the matrix share bytes.
        leading, stride = (unit, unit * max(atoms, 2)) if self.mn_major else (unit * 64, unit)
        if self.span == 16 and self.mn_major:
            leading, stride = stride, leading
        self.numbers = rounded(self.bf16, self.rng.standard_normal((self.rows, 16)))
        self.bits = descriptor(self.sm, self.start, leading, stride, self.span)
        where = addresses(self.sm, self.bits, self.mn_major, self.rows)
        assert len(np.unique(where)) == where.size
        halves = self.shared.view(np.uint16)
        halves[where // 2] = from_float(self.bf16, self.numbers)
