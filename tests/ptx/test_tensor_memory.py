"""The interpreter's units of Blackwell: tensor memory, its loads and stores, tcgen05.mma."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from ptx import cute
from ptx.unit_matrices import (
    Bytes,
    Floats,
    Operand,
    close,
    descriptor,
    from_float,
    load,
    rounded,
    to_float,
)
from ptx.unit_shim import Fault, aligned_bytes, call

Words = npt.NDArray[np.uint32]

SHAPES = {"32x32b": 0, "16x64b": 1, "16x128b": 2, "16x256b": 3}
REGISTERS = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4}  # of one repeat
LANES, COLUMNS = 128, 512


def address_of(lane: int, column: int) -> int:
    return lane << 16 | column


class Memory:
    """A block's tensor memory."""

    def __init__(self) -> None:
        self.handle = call("unit_tensor_memory")

    def close(self) -> None:
        call("unit_tensor_memory_end", self.handle)

    def allocate(self, columns: int) -> int | None:
        address = np.zeros(1, np.int64)
        call("unit_allocate", self.handle, columns, address)
        return None if address[0] < 0 else int(address[0])

    def free(self, address: int, columns: int) -> None:
        call("unit_deallocate", self.handle, address, columns)

    def write(self, lane: int, column: int, bits: Words) -> None:
        """Neighboring columns of a lane."""
        bits = np.ascontiguousarray(bits, np.uint32)
        call("unit_tensor_write", self.handle, lane, column, bits.size, bits)

    def cells(self, lanes: Sequence[int], column: int, columns: int) -> Words:
        bits = np.zeros((len(lanes), columns), np.uint32)
        for row, lane in enumerate(lanes):
            call("unit_tensor_read", self.handle, lane, column, columns, bits[row])
        return bits

    def load(
        self, shape: str, repeat: int, address: int, warp: int = 0, packed: bool = False
    ) -> Words:
        registers = np.zeros((32, max(repeat * REGISTERS[shape], 1)), np.uint32)
        call(
            "unit_tensor_load", self.handle, SHAPES[shape], repeat, packed, address, warp, registers
        )
        return registers

    def store(
        self,
        shape: str,
        repeat: int,
        address: int,
        registers: Words,
        warp: int = 0,
        packed: bool = False,
    ) -> None:
        call(
            "unit_tensor_store",
            self.handle,
            SHAPES[shape],
            repeat,
            packed,
            address,
            warp,
            np.ascontiguousarray(registers),
        )


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.close()


# Allocation ---------------------------------------------------------------------------------------


def test_allocation(memory: Memory) -> None:
    first, second, third = memory.allocate(256), memory.allocate(128), memory.allocate(128)
    assert first is not None and second is not None and third is not None
    assert sorted((first, second, third)) == [0, 256, 384]
    assert memory.allocate(32) is None
    memory.free(second, 128)
    assert memory.allocate(32) == second
    with pytest.raises(Fault, match="must not grow"):
        memory.allocate(64)
    memory.free(first, 256)
    memory.free(third, 128)
    with pytest.raises(Fault, match="ends with 32 columns"):
        call("unit_check_all_freed", memory.handle)
    memory.free(second, 32)
    call("unit_check_all_freed", memory.handle)


@pytest.mark.parametrize("columns", [0, 16, 48, 96, 1024])
def test_counts_of_columns(memory: Memory, columns: int) -> None:
    with pytest.raises(Fault, match="power of two"):
        memory.allocate(columns)
    with pytest.raises(Fault, match="power of two"):
        memory.free(0, columns)


def test_allocation_that_breaks_a_rule(memory: Memory) -> None:
    assert memory.allocate(64) == 0
    for address, columns in ((0, 32), (32, 64), (64, 64), (address_of(32, 0), 64)):
        with pytest.raises(Fault, match="not allocated so"):
            memory.free(address, columns)
    call("unit_relinquish", memory.handle)
    with pytest.raises(Fault, match="after relinquish_alloc_permit"):
        memory.allocate(32)
    memory.free(0, 64)
    with pytest.raises(Fault, match="not allocated so"):
        memory.free(0, 64)


def test_columns_that_are_not_there(memory: Memory) -> None:
    registers = np.zeros((32, 32), np.uint32)
    with pytest.raises(Fault, match="column 0 of tensor memory is not allocated"):
        memory.store("32x32b", 32, 0, registers)
    memory.allocate(32)
    memory.store("32x32b", 32, 0, registers)
    with pytest.raises(Fault, match="column 32 of tensor memory is not allocated"):
        memory.store("32x32b", 32, 1, registers)
    with pytest.raises(Fault, match="no lanes"):
        memory.store("32x32b", 32, 500, registers)
    memory.free(0, 32)
    with pytest.raises(Fault, match="not allocated"):
        memory.load("32x32b", 32, 0)
    memory.allocate(32)
    with pytest.raises(Fault, match="lane 0 of column 0 of tensor memory has not been written"):
        memory.load("32x32b", 32, 0)
    memory.store("32x32b", 32, 0, registers)
    memory.load("32x32b", 32, 0)
    call("unit_poison", memory.handle, 31, 32, 31, 32)
    memory.load("32x32b", 16, 0)
    with pytest.raises(Fault, match="lane 31 of column 31"):
        memory.load("32x32b", 32, 0)


# Loads and stores ---------------------------------------------------------------------------------


def place(shape: str, thread: int, register: int) -> tuple[int, int]:
    """Lane and column of a register, from CuTe's layouts of (thread, register).

    Those count bits, with lanes as far apart as the instruction's columns are wide; here a lane is
    1024 words of one bit each. They are CuTe's Copy_Traits of SM100_TMEM_LOAD, repeated.
    """
    layout = {
        "32x32b": "(32,128):(1024,1)",
        "16x64b": "((2,2,8),128):((8192,1,1024),2)",
        "16x128b": "((4,8),(2,64)):((1,1024),(8192,4))",
        "16x256b": "((4,8),(2,2,32)):((2,1024),(1,8192,8))",
    }[shape]
    return divmod(cute.at(layout, thread, register), 1024)


def test_fragments() -> None:
    """Read off the figures "Matrix fragment for shape ..."."""
    for shape, thread, register, lane, column in (
        ("32x32b", 0, 0, 0, 0),
        ("32x32b", 31, 5, 31, 5),
        ("16x64b", 0, 0, 0, 0),
        ("16x64b", 1, 0, 8, 0),
        ("16x64b", 2, 0, 0, 1),
        ("16x64b", 3, 0, 8, 1),
        ("16x64b", 4, 0, 1, 0),
        ("16x64b", 0, 1, 0, 2),
        ("16x64b", 31, 1, 15, 3),
        ("16x128b", 0, 0, 0, 0),
        ("16x128b", 3, 0, 0, 3),
        ("16x128b", 4, 0, 1, 0),
        ("16x128b", 0, 1, 8, 0),
        ("16x128b", 0, 2, 0, 4),
        ("16x256b", 0, 0, 0, 0),
        ("16x256b", 0, 1, 0, 1),
        ("16x256b", 1, 0, 0, 2),
        ("16x256b", 0, 2, 8, 0),
        ("16x256b", 31, 3, 15, 7),
        ("16x256b", 0, 4, 0, 8),
    ):
        assert place(shape, thread, register) == (lane, column), (shape, thread, register)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_loads_and_stores(memory: Memory, shape: str, packed: bool) -> None:
    memory.allocate(512)
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 1 << 32, (LANES, COLUMNS), np.uint32)
    for lane in range(LANES):
        memory.write(lane, 0, cells[lane])
    for warp, upper, repeat in itertools.product((0, 3, 6), (0, 16), (1, 2, 4, 8, 16, 32, 64, 128)):
        count = repeat * REGISTERS[shape]
        if count > 128 or (upper and shape == "32x32b"):
            continue
        lane = warp % 4 * 32 + upper
        places = [[place(shape, t, r) for r in range(count)] for t in range(32)]
        width = 1 + max(c for row in places for _, c in row)
        lanes = 32 if shape == "32x32b" else 16
        assert {p for row in places for p in row} == set(
            itertools.product(range(lanes), range(width))
        )

        width *= 2 if packed else 1
        column = min(37, COLUMNS - width)
        at = address_of(lane, column)
        registers, area = np.zeros(1, np.uint32), np.zeros(4, np.uint32)
        call("unit_tensor_access", SHAPES[shape], repeat, packed, at, warp, registers, area)
        assert registers[0] == count
        assert area.tolist() == [lane, lane + lanes, column, column + width]

        loaded = memory.load(shape, repeat, at, warp, packed)
        expected = np.zeros((32, count), np.uint32)
        for t, r in itertools.product(range(32), range(count)):
            from_lane, c = places[t][r]
            if packed:
                low, high = (int(cells[lane + from_lane, column + 2 * c + i]) for i in (0, 1))
                expected[t, r] = (high & 0xFFFF) << 16 | low & 0xFFFF
            else:
                expected[t, r] = cells[lane + from_lane, column + c]
        np.testing.assert_array_equal(loaded, expected)

        stored = rng.integers(0, 1 << 32, (32, count), np.uint32)
        memory.store(shape, repeat, at, stored, warp, packed)
        for t, r in itertools.product(range(32), range(count)):
            to_lane, c = places[t][r]
            bits = int(stored[t, r])
            if packed:
                cells[lane + to_lane, column + 2 * c] = bits & 0xFFFF
                cells[lane + to_lane, column + 2 * c + 1] = bits >> 16
            else:
                cells[lane + to_lane, column + c] = bits
        np.testing.assert_array_equal(memory.cells(range(LANES), 0, COLUMNS), cells)


def test_lanes_of_a_warp(memory: Memory) -> None:
    memory.allocate(32)
    for lane in range(LANES):
        memory.write(lane, 0, np.zeros(32, np.uint32))
    for warp, lane in itertools.product(range(8), range(0, 128, 16)):
        mine = warp % 4 * 32
        for shape in SHAPES:
            if lane == mine or (lane == mine + 16 and shape != "32x32b"):
                memory.load(shape, 1, address_of(lane, 0), warp)
            else:
                with pytest.raises(Fault, match="may not access lane"):
                    memory.load(shape, 1, address_of(lane, 0), warp)


@pytest.mark.parametrize(
    ("shape", "repeat"), [("32x32b", 0), ("32x32b", 3), ("16x128b", 128), ("16x256b", 64)]
)
def test_repeats_that_do_not_exist(memory: Memory, shape: str, repeat: int) -> None:
    memory.allocate(512)
    with pytest.raises(Fault, match="repeat count"):
        memory.load(shape, repeat, 0)


# Instruction descriptors --------------------------------------------------------------------------


def instruction(
    m: int,
    n: int,
    bf16: bool,
    transposed: tuple[bool, bool] = (False, False),
    negated: tuple[bool, bool] = (False, False),
) -> int:
    """By the table "Instruction descriptor format for .kind::f16", fp32 accumulators."""
    fields = (
        (4, 1),
        (7, bf16),
        (10, bf16),
        (13, negated[0]),
        (14, negated[1]),
        (15, transposed[0]),
        (16, transposed[1]),
        (17, n // 8),
        (24, m // 16),
    )
    return sum(int(value) << bit for bit, value in fields)


def decode(bits: int) -> list[int]:
    """M, N, bf16, A and B negated, A and B transposed."""
    fields = np.zeros(7, np.uint32)
    call("unit_decode_instruction", bits, fields)
    return [int(x) for x in fields]


def test_instruction_descriptors() -> None:
    # fp32 | bf16 | bf16 | N = 128 | M = 128, and with B transposed in fp16 with N = 64.
    assert decode(0x10 | 0x80 | 0x400 | 16 << 17 | 8 << 24) == [128, 128, 1, 0, 0, 0, 0]
    assert decode(0x08210490) == [128, 128, 1, 0, 0, 0, 1]
    assert decode(0x08110010) == [128, 64, 0, 0, 0, 0, 1]
    assert decode(0x0440A010) == [64, 256, 0, 1, 0, 1, 0]
    assert decode(0x04404010) == [64, 256, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (1 << 0, "sparsity selector"),
        (1 << 2, "sparsity"),
        (1 << 3, "saturation"),
        (1 << 4, "fp16 accumulators"),
        (3 << 4, "type of D"),
        (1 << 6, "reserved"),
        (1 << 23, "reserved"),
        (1 << 29, "reserved"),
        (1 << 30, "maximum shift"),
        (1 << 7, "two types"),
        (1 << 8, "type of A or B"),
        (1 << 12, "type of A or B"),
        (1 << 17, "N is not a multiple"),
        (16 << 17, "N is not a multiple"),
        (32 << 17, "N is not a multiple"),
        (8 << 24, "M is neither"),
        (16 << 24, "M is neither"),
        (1 << 24, "M is neither"),
    ],
)
def test_instruction_descriptors_that_break_a_rule(change: int, message: str) -> None:
    with pytest.raises(Fault, match=message):
        decode(instruction(128, 128, True) ^ change)


def test_narrow_instructions() -> None:
    assert decode(instruction(64, 8, True))[:2] == [64, 8]
    with pytest.raises(Fault, match="N is not a multiple"):
        decode(instruction(128, 8, True))


# Products -----------------------------------------------------------------------------------------


def lanes_of(m: int, first: int) -> list[int]:
    """Layout D for M of 128; layout F for 64: the lower or the upper 16 lanes of each quarter."""
    if m == 128:
        return list(range(128))
    return [first + lane for quarter in range(4) for lane in range(32 * quarter, 32 * quarter + 16)]


def multiply(memory: Memory, shared: Bytes, *arguments: Any) -> None:
    call("unit_mma", memory.handle, shared, shared.size, *arguments)


def accumulators(memory: Memory, d: int, m: int, n: int) -> Floats:
    return memory.cells(lanes_of(m, d >> 16), d & 0xFFFF, n).view(np.float32)


def set_accumulators(memory: Memory, d: int, numbers: Floats) -> None:
    bits = numbers.view(np.uint32)
    for row, lane in enumerate(lanes_of(len(numbers), d >> 16)):
        memory.write(lane, d & 0xFFFF, bits[row])


PRODUCTS = [
    (m, n, bf16, transposed, span)
    for m, n, bf16 in ((128, 128, True), (128, 16, False), (64, 8, True), (64, 136, False))
    for transposed in itertools.product((False, True), repeat=2)
    for span in (16, 32, 64, 128)
    if not (transposed[1] and 2 * n % span)
]


@pytest.mark.parametrize(("m", "n", "bf16", "transposed", "span"), PRODUCTS)
def test_products_of_shared_memory(
    memory: Memory, m: int, n: int, bf16: bool, transposed: tuple[bool, bool], span: int
) -> None:
    rng = np.random.default_rng(n + span)
    memory.allocate(256)
    shared = np.zeros(224 * 1024, np.uint8)
    a = Operand(rng, 100, m, bf16, transposed[0], span, 2048, shared)
    b = Operand(rng, 100, n, bf16, transposed[1], span, 128 * 1024, shared)
    product = a.numbers.astype(np.float64) @ b.numbers.T.astype(np.float64)
    d = address_of(16 if m == 64 and span == 64 else 0, 100)
    for negated, accumulate in itertools.product(
        ((False, False), (True, False), (True, True), (False, True)), (False, True)
    ):
        before = rng.standard_normal((m, n)).astype(np.float32)
        set_accumulators(memory, d, before)
        bits = instruction(m, n, bf16, transposed, negated)
        multiply(memory, shared, bits, d, False, a.bits, b.bits, accumulate)
        sign = -1 if negated[0] != negated[1] else 1
        close(
            accumulators(memory, d, m, n), sign * product + accumulate * before.astype(np.float64)
        )


@pytest.mark.parametrize(("m", "first"), [(128, 0), (64, 0), (64, 16)])
@pytest.mark.parametrize("bf16", [False, True])
def test_products_of_tensor_memory(memory: Memory, m: int, first: int, bf16: bool) -> None:
    rng = np.random.default_rng(3)
    memory.allocate(256)
    shared = np.zeros(32 * 1024, np.uint8)
    b = Operand(rng, 100, 64, bf16, True, 128, 0, shared)
    numbers = rounded(bf16, rng.standard_normal((m, 16)))
    a, d = address_of(first, 200), address_of(first, 32)
    pairs = from_float(bf16, numbers).astype(np.uint32)
    for row, lane in enumerate(lanes_of(m, first)):
        memory.write(lane, 200, np.array(pairs[row, 1::2] << 16 | pairs[row, ::2], np.uint32))
    for negated in (False, True):
        bits = instruction(m, 64, bf16, (False, True), (negated, False))
        multiply(memory, shared, bits, d, True, a, b.bits, False)
        product = numbers.astype(np.float64) @ b.numbers.T.astype(np.float64)
        close(accumulators(memory, d, m, 64), -product if negated else product)

    of_d, of_a, count = np.zeros((4, 4), np.uint32), np.zeros((4, 4), np.uint32), np.zeros(1, "u4")
    call("unit_mma_touched", bits, d, a, of_d, of_a, count)
    for ranges, column, width in ((of_d, 32, 64), (of_a, 200, 8)):
        covered = [lane for x, y, *_ in ranges[: count[0]].tolist() for lane in range(x, y)]
        assert covered == lanes_of(m, first)
        assert {tuple(x) for x in ranges[: count[0], 2:].tolist()} == {(column, column + width)}


def test_products_that_break_a_rule(memory: Memory) -> None:
    rng = np.random.default_rng(4)
    shared = np.zeros(32 * 1024, np.uint8)
    a = Operand(rng, 100, 128, True, False, 32, 0, shared)
    b = Operand(rng, 100, 32, True, False, 32, 8192, shared)
    bits = instruction(128, 32, True)
    with pytest.raises(
        Fault, match=r"D of tcgen05\.mma: column 0 of tensor memory is not allocated"
    ):
        multiply(memory, shared, bits, 0, False, a.bits, b.bits, False)
    memory.allocate(64)
    with pytest.raises(Fault, match=r"D of tcgen05\.mma: lane 0 of column 0 .* not been written"):
        multiply(memory, shared, bits, 0, False, a.bits, b.bits, True)
    multiply(memory, shared, bits, 0, False, a.bits, b.bits, False)
    multiply(memory, shared, bits, 0, False, a.bits, b.bits, True)
    with pytest.raises(Fault, match=r"D of tcgen05\.mma: column 64 of"):
        multiply(memory, shared, bits, 33, False, a.bits, b.bits, False)
    for lane in (16, 32):
        with pytest.raises(Fault, match="starts at lane"):
            multiply(memory, shared, bits, address_of(lane, 0), False, a.bits, b.bits, False)
    with pytest.raises(Fault, match=r"A of tcgen05\.mma: lane 0 of column 40 .* not been written"):
        multiply(memory, shared, bits, 0, True, 40, b.bits, False)
    with pytest.raises(Fault, match="in tensor memory is transposed"):
        transposed = instruction(128, 32, True, (True, False))
        multiply(memory, shared, transposed, 0, True, 40, b.bits, False)
    narrow = instruction(64, 32, True)
    with pytest.raises(Fault, match=r"A of tcgen05\.mma starts at lane 16, D at lane 0"):
        multiply(memory, shared, narrow, 0, True, address_of(16, 40), b.bits, False)
    with pytest.raises(Fault, match="bits 46 to 48 are 0, not 1"):
        wrong = descriptor(90, 0, 16, 256, 32)
        multiply(memory, shared, bits, 0, False, wrong, b.bits, False)
    with pytest.raises(Fault, match="shared memory has"):
        outside = descriptor(100, 32 * 1024 - 256, 16, 256, 32)
        multiply(memory, shared, bits, 0, False, outside, b.bits, False)


def test_attention_products(memory: Memory) -> None:
    """Scores and output of the Blackwell kernel: boxes, descriptors, steps, columns; head_dim 128."""
    rng = np.random.default_rng(5)
    query, key, value = (rounded(True, rng.standard_normal((128, 128))) for _ in range(3))
    shared = np.zeros(128 * 1024, np.uint8)
    places = (8192, 41984 // 1024 * 1024, 80 * 1024)
    for numbers, to in zip((query, key, value), places, strict=True):
        matrix = aligned_bytes(128 * 128 * 2, 16).view(np.uint16).reshape(128, 128)
        matrix[:] = from_float(True, numbers)
        load(matrix, 128, shared, to)
    assert memory.allocate(512) == 0
    in_scores, in_output = 128, 384
    for k in range(8):
        step = k // 4 * 128 * 128 + k % 4 * 32
        a, b = (descriptor(100, to + step, 16, 1024, 128) for to in places[:2])
        multiply(memory, shared, instruction(128, 128, True), in_scores, False, a, b, k > 0)
    scores = accumulators(memory, in_scores, 128, 128)
    np.testing.assert_allclose(scores, query.astype(np.float64) @ key.T, rtol=1e-5, atol=1e-5)

    # One row a thread; the weights take the place of the scores, two in a column.
    for warp in range(4):
        lane = 32 * warp
        for column in range(0, 128, 32):
            registers = memory.load("32x32b", 32, address_of(lane, in_scores + column), warp)
            weights = from_float(True, registers.view(np.float32)).astype(np.uint32)
            packed = np.array(weights[:, 1::2] << 16 | weights[:, ::2], np.uint32)
            at = address_of(lane, in_scores + column // 2)
            memory.store("32x32b", 16, at, packed, warp)
    for k in range(8):
        b = descriptor(100, places[2] + k * 16 * 128, 128 * 128, 1024, 128)
        bits = instruction(128, 128, True, (False, True))
        multiply(memory, shared, bits, in_output, True, in_scores + 8 * k, b, k > 0)
    output = accumulators(memory, in_output, 128, 128)
    expected = to_float(True, from_float(True, scores)).astype(np.float64) @ value
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-3)
