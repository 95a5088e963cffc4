"""The interpreter's units of both architectures: numbers, tensor maps, descriptors, wgmma.

Expected values are worked out by hand from the PTX ISA and the driver's documentation, or computed
with numpy from definitions that share nothing with the units.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ptx import cute
from ptx.unit_matrices import (
    Bytes,
    Floats,
    Map,
    Operand,
    addresses,
    close,
    coordinates,
    descriptor,
    floats,
    from_float,
    load,
    rounded,
    to_float,
)
from ptx.unit_shim import Fault, aligned_bytes, call, pointer

# Chunks of 16 bytes: row by row, which one of the row lies first, second, ... (PTX ISA 5.5.7, the
# figures of the swizzling modes).
PATTERNS = {
    16: ["0"] * 8,
    32: ["01", "01", "01", "01", "10", "10", "10", "10"],
    64: ["0123", "0123", "1032", "1032", "2301", "2301", "3210", "3210"],
    128: [
        "01234567",
        "10325476",
        "23016745",
        "32107654",
        "45670123",
        "54761032",
        "67452301",
        "76543210",
    ],
}
SPANS = tuple(PATTERNS)
BITS = {16: 0, 32: 1, 64: 2, 128: 3}


def swizzled(span: int, address: int) -> int:
    """The same by table, for addresses."""
    row, byte = divmod(address, span)
    place = PATTERNS[span][row % 8].index(str(byte // 16))
    return row * span + place * 16 + byte % 16


# Numbers ------------------------------------------------------------------------------------------


def same_floats(a: Floats, b: Floats) -> None:
    nan = np.isnan(a)
    np.testing.assert_array_equal(nan, np.isnan(b))
    np.testing.assert_array_equal(a.view(np.uint32)[~nan], b.view(np.uint32)[~nan])


def test_every_16_bit_number() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    same_floats(to_float(False, bits), bits.view(np.float16).astype(np.float32))
    same_floats(to_float(True, bits), (bits.astype(np.uint32) << 16).view(np.float32))


@pytest.mark.parametrize("bf16", [False, True])
def test_rounding_to_16_bits(bf16: bool) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = to_float(bf16, bits)
    finite = numbers[np.isfinite(numbers)]
    # The numbers themselves, the ties between neighbors, what is just beside those, and noise.
    with np.errstate(over="ignore"):
        ties = ((finite[:-1].astype(np.float64) + finite[1:]) / 2).astype(np.float32)
        beside = [np.nextafter(ties, np.float32(s * np.inf)) for s in (-1, 1)]
    noise = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint32).view(np.float32)
    x = np.concatenate([numbers, ties, *beside, noise, floats(65519.996, 65520, -65520)])
    if bf16:
        expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    else:
        with np.errstate(over="ignore"):
            expected = x.astype(np.float16).view(np.uint16)
    nan = np.isnan(x)
    actual = from_float(bf16, x)
    np.testing.assert_array_equal(actual[~nan], expected[~nan])
    assert (actual[nan] == 0x7FFF).all()


def test_packing() -> None:
    assert call("unit_pack", False, 1.0, -2.0) == 0x3C00C000
    assert call("unit_pack", True, 1.0, -2.0) == 0x3F80C000


def exp2(x: Floats, flush: bool) -> Floats:
    result = np.zeros(x.shape, np.float32)
    call("unit_exp2", flush, x, result, x.size)
    return result


def test_exp2() -> None:
    x = np.random.default_rng(0).uniform(-160, 130, 100_000).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = np.exp2(x.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_max_ulp(exp2(x, False), expected, 2)
    tiny = np.abs(expected) < np.finfo(np.float32).tiny
    np.testing.assert_array_max_ulp(exp2(x, True), np.where(tiny, np.float32(0), expected), 2)
    special = floats(-np.inf, -0.0, 0.0, np.inf, np.nan, 1e-40)
    for flush in (False, True):
        np.testing.assert_array_equal(exp2(special, flush), floats(0, 1, 1, np.inf, np.nan, 1))


# Swizzles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", SPANS)
def test_swizzle(span: int) -> None:
    for address in range(4096):
        expected = swizzled(span, address)
        assert call("unit_swizzled", span, address) == expected
        assert cute.swizzle(BITS[span], 4, 3, address) == expected


# Tensor maps --------------------------------------------------------------------------------------

ELEMENT_TYPES = {1: 0, 2: 9, 4: 7, 8: 8}  # by bytes: u8, bf16, fp32, fp64
SWIZZLES = {16: 0, 32: 1, 64: 2, 128: 3}


def sound(**changes: Any) -> Map:
    arguments: dict[str, Any] = {"extents": [64, 32], "strides": [128], "box": [64, 8], "type": 9}
    return Map(**{**arguments, **changes})


def test_encoding() -> None:
    ok, invalid, unsupported = 0, 1, 801
    cases: list[tuple[int, dict[str, Any]]] = [
        (ok, {}),
        (ok, {"swizzle": 3}),
        (ok, {"box": [64, 256]}),
        (ok, {"extents": [1 << 32, 32]}),
        (ok, {"strides": [(1 << 40) - 16]}),
        (ok, {"steps": [1, 8]}),
        (ok, {"box": [32, 8], "swizzle": 2}),
        (invalid, {"rank": 0}),
        (invalid, {"rank": 6}),
        (invalid, {"type": 16}),
        (invalid, {"address": 8}),
        (invalid, {"extents": [0, 32]}),
        (invalid, {"extents": [64, (1 << 32) + 1]}),
        (invalid, {"strides": [136]}),
        (invalid, {"strides": [1 << 40]}),
        (invalid, {"box": [0, 8]}),
        (invalid, {"box": [64, 257]}),
        (invalid, {"box": [4, 8]}),
        (invalid, {"steps": [1, 0]}),
        (invalid, {"steps": [1, 9]}),
        (invalid, {"box": [64, 8], "swizzle": 2}),
        (invalid, {"box": [32, 8], "swizzle": 1}),
        (invalid, {"box": [72, 8], "swizzle": 3}),
        (invalid, {"swizzle": 7}),
        (invalid, {"interleave": 3}),
        (invalid, {"promotion": 4}),
        (invalid, {"fill": 2}),
        (unsupported, {"interleave": 1}),
        (unsupported, {"type": 13}),
        (unsupported, {"swizzle": 4}),
        (unsupported, {"fill": 1}),
    ]
    for expected, changes in cases:
        assert sound(**changes).encode() == expected, changes


def test_box_by_hand() -> None:
    """A tensor of 3 rows of 20 bytes, 32 apart; a box of 32 x 4 that hangs over every edge."""
    memory = aligned_bytes(96, 16)
    memory[:] = np.arange(96)
    box = Map([20, 3], [32], [32, 4], address=pointer(memory))
    assert box.encode() == 0
    shared = np.full(512, 0xAA, np.uint8)
    call("unit_load_box", box.map, coordinates(-2, -1), shared, 512, 256)
    expected = np.zeros((4, 32), np.uint8)
    for row in range(3):
        expected[row + 1, 2:22] = np.arange(20) + 32 * row
    np.testing.assert_array_equal(shared[256:384].reshape(4, 32), expected)
    assert (shared[:256] == 0xAA).all() and (shared[384:] == 0xAA).all()


def test_box_with_steps_by_hand() -> None:
    """Of 7 positions every third is copied, rounded up: 3; from coordinate -1 on: -1, 2, 5."""
    memory = aligned_bytes(6 * 16, 16)
    memory[:] = np.arange(96)
    box = Map([16, 6], [16], [16, 7], steps=[5, 3], address=pointer(memory))
    assert box.encode() == 0
    shared = np.full(128, 0xAA, np.uint8)
    call("unit_load_box", box.map, coordinates(0, -1), shared, 128, 0)
    expected = [np.zeros(16), np.arange(32, 48), np.arange(80, 96)]
    np.testing.assert_array_equal(shared[:48].reshape(3, 16), expected)
    assert (shared[48:] == 0xAA).all()


@dataclass
class RandomBox:
    """A random tensor, box and place for it in shared memory, and which byte goes where."""

    seed: int

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        rank = rng.randint(1, 5)
        size = rng.choice(list(ELEMENT_TYPES))
        span = rng.choice(SPANS)
        width = span if span != 16 else 16 * rng.randint(1, 4)
        steps = [1] + [rng.choice([1, 1, 2, 3, 8]) for _ in range(rank - 1)]
        counts = [width // size] + [rng.randint(1, 4) for _ in range(rank - 1)]
        box = [counts[0]]
        for count, step in zip(counts[1:], steps[1:], strict=True):
            box.append(count * step - rng.randrange(step))
        extents = [rng.randint(1, 80)] + [rng.randint(1, 9) for _ in range(rank - 1)]
        strides = []
        row = extents[0] * size
        for extent in extents[1:]:
            strides.append(-(-row // 16) * 16 + 16 * rng.randint(0, 2))
            row = strides[-1] * extent
        self.memory = aligned_bytes(row + 64, 16)
        self.memory[:] = np.random.default_rng(self.seed).integers(1, 256, self.memory.size)
        self.map = Map(
            extents,
            strides,
            box,
            steps,
            address=pointer(self.memory),
            type=ELEMENT_TYPES[size],
            swizzle=SWIZZLES[span],
        )
        assert self.map.encode() == 0
        at = [
            rng.randint(-count * step, extent + step)
            for count, step, extent in zip(counts, steps, extents, strict=True)
        ]
        self.at = np.array(at, np.int32)
        self.box_bytes = int(np.prod(counts)) * size
        self.address = rng.randrange(8) * 128
        self.shared_bytes = self.address + -(-self.box_bytes // 1024) * 1024 + 1024
        self.inside: dict[int, int] = {}  # shared address to offset in global memory
        self.outside: set[int] = set()
        for place, index in enumerate(itertools.product(*(range(n) for n in reversed(counts)))):
            position = [a + i * step for a, i, step in zip(at, reversed(index), steps, strict=True)]
            valid = all(0 <= p < e for p, e in zip(position, extents, strict=True))
            offset = sum(p * s for p, s in zip(position, [size, *strides], strict=True))
            for byte in range(size):
                to = swizzled(span, self.address + place * size + byte)
                if valid:
                    self.inside[to] = offset + byte
                else:
                    self.outside.add(to)


def as_ranges(addresses: set[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for address in sorted(addresses):
        if ranges and ranges[-1][1] == address:
            ranges[-1] = (ranges[-1][0], address + 1)
        else:
            ranges.append((address, address + 1))
    return ranges


@pytest.mark.parametrize("seed", range(150))
def test_random_boxes(seed: int) -> None:
    box = RandomBox(seed)
    # Load.
    shared = np.full(box.shared_bytes, 0xAA, np.uint8)
    expected = shared.copy()
    for to, source in box.inside.items():
        expected[to] = box.memory[source]
    expected[list(box.outside)] = 0
    call("unit_load_box", box.map.map, box.at, shared, shared.size, box.address)
    np.testing.assert_array_equal(shared, expected)
    # Store.
    shared = np.random.default_rng(seed).integers(0, 256, box.shared_bytes, np.uint8)
    stored = box.memory.copy()
    for source, to in box.inside.items():
        stored[to] = shared[source]
    call("unit_store_box", box.map.map, box.at, shared, shared.size, box.address)
    np.testing.assert_array_equal(box.memory, stored)
    # What they touch.
    transaction, counts = np.zeros(1, np.uint32), np.zeros(2, np.uint32)
    pairs = np.zeros((2, 4096, 2), np.uint64)
    call(
        "unit_box_touched",
        box.map.map,
        box.at,
        box.address,
        transaction,
        pairs[0],
        counts[:1],
        pairs[1],
        counts[1:],
        4096,
    )
    assert transaction[0] == box.box_bytes == len(box.inside) + len(box.outside)
    shared_ranges = [tuple(map(int, pair)) for pair in pairs[0, : counts[0]]]
    assert shared_ranges == as_ranges(set(box.inside) | box.outside)
    base = pointer(box.memory)
    global_ranges = [tuple(int(x) - base for x in pair) for pair in pairs[1, : counts[1]]]
    assert global_ranges == as_ranges(set(box.inside.values()))


def test_copies_that_break_a_rule() -> None:
    memory = aligned_bytes(64 * 128, 16)
    shared = np.zeros(4096, np.uint8)
    at = coordinates(0, 0)
    box = sound(address=pointer(memory), swizzle=3)
    assert box.encode() == 0
    call("unit_load_box", box.map, at, shared, 4096, 4096 - 1024)
    for function in ("unit_load_box", "unit_store_box"):
        with pytest.raises(Fault, match="multiple of 128"):
            call(function, box.map, at, shared, 4096, 64)
        with pytest.raises(Fault, match="shared memory has 4096 bytes"):
            call(function, box.map, at, shared, 4096, 4096 - 896)
        with pytest.raises(Fault, match="not a tensor map"):
            call(function, aligned_bytes(128, 64), at, shared, 4096, 0)
    narrow = sound(address=pointer(memory), box=[32, 8], swizzle=3)
    assert narrow.encode() == 0
    with pytest.raises(Fault, match="not modeled"):
        call("unit_load_box", narrow.map, at, shared, 4096, 0)


# Descriptors --------------------------------------------------------------------------------------


def layout_addresses(
    layout: str, span: int, rows: int, columns: int, element_bytes: int, start: int = 0
) -> npt.NDArray[np.uint32]:
    """Of Swizzle<n, 4, 3> o layout, whose offsets are in elements."""
    return np.array(
        [
            [
                cute.swizzle(BITS[span], 4, 3, start + element_bytes * cute.at(layout, r, c))
                for c in range(columns)
            ]
            for r in range(rows)
        ],
        np.uint32,
    )


@pytest.mark.parametrize("sm", [90, 100])
def test_layouts_of_the_isa(sm: int) -> None:
    """The examples of "Canonical layouts", with their exact layouts and offsets."""
    tf32, bf16 = 4, 2
    for layout, mn_major, span, size, rows, columns, leading, stride in (
        ("((8,2),(4,4)):((4,32),(1,64))", False, 16, tf32, 16, 16, 64 * tf32, 32 * tf32),
        ("((8,2),(4,4)):((8,64),(1,4))", False, 32, tf32, 16, 8, 16, 64 * tf32),
        ("((8,1,2),(8,2)):((1,8,64),(8,128))", True, 16, bf16, 16, 16, 128 * bf16, 64 * bf16),
        ("((8,2,2),(8,2)):((1,8,128),(16,256))", True, 32, bf16, 32, 16, 128 * bf16, 256 * bf16),
        ("((8,4,2),(8,2)):((1,8,256),(32,512))", True, 64, bf16, 64, 16, 256 * bf16, 512 * bf16),
    ):
        actual = addresses(
            sm, descriptor(sm, 0, leading, stride, span), mn_major, rows, columns, size
        )
        np.testing.assert_array_equal(
            actual, layout_addresses(layout, span, rows, columns, size), layout
        )


@pytest.mark.parametrize("sm", [90, 100])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("mn_major", [False, True])
def test_canonical_layouts(sm: int, span: int, mn_major: bool) -> None:
    """All modes with other offsets, by the table of canonical layouts; T is 8 and W is span / 16."""
    rng = random.Random(f"{sm} {span} {mn_major}")
    t, w = 8, span // 16
    unit = 8 * span if span > 16 else 16
    for _ in range(20):
        m = rng.randint(1, 4)
        start = rng.randrange(16) * 1024
        leading, stride = (rng.randint(1, 20) * unit for _ in range(2))
        lbo, sbo = leading // 2, stride // 2
        if mn_major and span == 16:
            layout = f"(({t},1,{m}),(8,2)):((1,{t},{sbo}),({t},{lbo}))"
        elif mn_major:
            layout = f"(({t},{w},{m}),(8,2)):((1,{t},{lbo}),({w * t},{sbo}))"
        elif span == 16:
            layout = f"((8,{m}),({t},2)):(({t},{sbo}),(1,{lbo}))"
        else:
            layout = f"((8,{m}),({t},2)):(({w * t},{sbo}),(1,{t}))"
        rows = t * w * m if mn_major else 8 * m
        bits = descriptor(sm, start, leading, stride, span)
        np.testing.assert_array_equal(
            addresses(sm, bits, mn_major, rows),
            layout_addresses(layout, span, rows, 16, 2, start),
            layout,
        )


def test_touched_bytes() -> None:
    pairs, count = np.zeros((64, 2), np.uint64), np.zeros(1, np.uint32)
    for mn_major, rows in ((False, 64), (True, 128)):
        bits = descriptor(90, 2048, 4096, 1024, 128)
        call("unit_smem_touched", 90, bits, mn_major, rows, 16, pairs, count, 64)
        ranges = [tuple(map(int, pair)) for pair in pairs[: count[0]]]
        touched = {int(a) + i for a in addresses(90, bits, mn_major, rows).flat for i in (0, 1)}
        assert ranges == as_ranges(touched)
    assert ranges == [(2048, 4096), (6144, 8192)]


def test_descriptors_of_the_kernels() -> None:
    """The constants in the kernels' ptx.cuh are these fields."""
    low = (64 * 128 >> 4) << 16 | (0x12400 & 0x3FFFF) >> 4
    assert 0x40000040 << 32 | low == descriptor(90, 0x12400, 8192, 1024, 128)
    high = 2 << 29 | 1 << 14 | 1024 >> 4
    assert high << 32 | low == descriptor(100, 0x12400, 8192, 1024, 128)


def test_descriptors_that_break_a_rule() -> None:
    good = {sm: descriptor(sm, 0, 16, 1024, 128) for sm in (90, 100)}
    for sm, bits in good.items():
        addresses(sm, bits, False, 64)
        for flipped in (14, 15, 30, 31, 46, 47, 48, 49, 50, 51, 52, 55, 60):
            with pytest.raises(Fault, match="descriptor"):
                addresses(sm, bits ^ 1 << flipped, False, 64)
    with pytest.raises(Fault, match="bit"):
        addresses(90, good[90] | 1 << 61, False, 64)
    with pytest.raises(Fault, match="32-byte atoms"):
        addresses(100, good[100] ^ 3 << 61, False, 64)
    for mode in (3, 5, 7):
        with pytest.raises(Fault, match=f"no swizzle mode {mode}"):
            addresses(100, good[100] & ~(7 << 61) | mode << 61, False, 64)
    for start, leading, stride, mn_major, message in (
        (128, 16, 1024, False, "base offset must not be 0"),
        (512, 16, 1024, False, "base offset must not be 0"),
        (0, 16, 1040, False, "breaks the swizzle"),
        (0, 16, 512, False, "breaks the swizzle"),
        (112, 16, 1024, False, "runs out of the swizzle"),
        (16, 8192, 1024, True, "runs out of the swizzle"),
        (0, 144, 1024, True, "breaks the swizzle"),
    ):
        with pytest.raises(Fault, match=message):
            addresses(90, descriptor(90, start, leading, stride, 128), mn_major, 128)


# wgmma --------------------------------------------------------------------------------------------


def d_place(thread: int, register: int) -> tuple[int, int]:
    place = np.zeros(2, np.uint32)
    call("unit_wgmma_d_place", thread, register, place)
    return int(place[0]), int(place[1])


def a_place(thread: int, register: int, half: int) -> tuple[int, int]:
    place = np.zeros(2, np.uint32)
    call("unit_wgmma_a_place", thread, register, half, place)
    return int(place[0]), int(place[1])


def test_accumulator_fragment() -> None:
    """Read off the figure "WGMMA .m64nNk16 register fragment layout for accumulator matrix D"."""
    for thread, register, row, column in (
        (0, 0, 0, 0),
        (0, 1, 0, 1),
        (1, 0, 0, 2),
        (3, 1, 0, 7),
        (0, 4, 0, 8),
        (0, 2, 8, 0),
        (0, 3, 8, 1),
        (4, 0, 1, 0),
        (31, 1, 7, 7),
        (31, 3, 15, 7),
        (28, 2, 15, 0),
        (32, 0, 16, 0),
        (63, 3, 31, 7),
        (64, 6, 40, 8),
        (96, 0, 48, 0),
        (127, 127, 63, 255),
    ):
        assert d_place(thread, register) == (row, column)
    for n in (8, 128):
        places = {d_place(t, r) for t in range(128) for r in range(n // 2)}
        assert places == set(itertools.product(range(64), range(n)))


def test_factor_fragment() -> None:
    """Read off the figure "WGMMA .m64nNk16 register fragment layout for matrix A", a0 to a7."""
    for thread, element, row, column in (
        (0, 0, 0, 0),
        (0, 1, 0, 1),
        (0, 2, 8, 0),
        (0, 3, 8, 1),
        (0, 4, 0, 8),
        (0, 5, 0, 9),
        (0, 6, 8, 8),
        (0, 7, 8, 9),
        (1, 0, 0, 2),
        (3, 5, 0, 15),
        (4, 0, 1, 0),
        (31, 7, 15, 15),
        (32, 0, 16, 0),
        (127, 7, 63, 15),
    ):
        assert a_place(thread, element // 2, element % 2) == (row, column)
    places = {a_place(t, r, h) for t in range(128) for r in range(4) for h in (0, 1)}
    assert places == set(itertools.product(range(64), range(16)))


def wgmma(
    n: int,
    bf16: bool,
    scales: tuple[int, int],
    transposed: tuple[bool, bool],
    a: int | npt.NDArray[np.uint32],
    b: int,
    shared: Bytes,
    scale_d: bool,
    d: Floats,
) -> Floats:
    d = d.copy()
    registers, a_bits = (0, a) if isinstance(a, int) else (a, 0)
    call(
        "unit_wgmma",
        n,
        bf16,
        *scales,
        *transposed,
        registers,
        a_bits,
        b,
        shared,
        shared.size,
        scale_d,
        d,
    )
    return d


WGMMA_CASES = [
    (n, bf16, ta, tb, span)
    for n, bf16 in ((8, True), (64, False), (128, True), (136, False), (256, True))
    for ta, tb in itertools.product((False, True), repeat=2)
    for span in SPANS
    if not (tb and 2 * n % span)  # whole chunks of the swizzle
]


@pytest.mark.parametrize(("n", "bf16", "ta", "tb", "span"), WGMMA_CASES)
def test_products_of_shared_memory(n: int, bf16: bool, ta: bool, tb: bool, span: int) -> None:
    rng = np.random.default_rng(n + span)
    shared = np.zeros(232448 // 1024 * 1024, np.uint8)
    a = Operand(rng, 90, 64, bf16, ta, span, 1024, shared)
    b = Operand(rng, 90, n, bf16, tb, span, 128 * 1024, shared)
    d = rng.standard_normal((64, n)).astype(np.float32)
    product = a.numbers.astype(np.float64) @ b.numbers.T.astype(np.float64)
    for scales in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        for scale_d in (False, True):
            actual = wgmma(n, bf16, scales, (ta, tb), a.bits, b.bits, shared, scale_d, d)
            close(actual, scales[0] * scales[1] * product + scale_d * d.astype(np.float64))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("scale_a", [1, -1])
def test_products_of_registers(bf16: bool, scale_a: int) -> None:
    rng = np.random.default_rng(1)
    shared = np.zeros(64 * 1024, np.uint8)
    b = Operand(rng, 90, 64, bf16, True, 128, 0, shared)
    a = rounded(bf16, rng.standard_normal((64, 16)))
    registers = np.zeros((128, 4), np.uint32)
    bits = from_float(bf16, a)
    for thread, r in itertools.product(range(128), range(4)):
        low, high = (int(bits[a_place(thread, r, half)]) for half in (0, 1))
        registers[thread, r] = high << 16 | low
    d = rng.standard_normal((64, 64)).astype(np.float32)
    actual = wgmma(64, bf16, (scale_a, 1), (False, True), registers, b.bits, shared, True, d)
    close(actual, scale_a * a.astype(np.float64) @ b.numbers.T + d)


def test_products_that_are_not_finite() -> None:
    shared = np.zeros(4096, np.uint8)
    a, b = (descriptor(90, start, 16, 256, 32) for start in (0, 2048))
    halves = shared.view(np.uint16)
    one, inf, nan = from_float(True, floats(1, np.inf, np.nan))
    at_a, at_b = addresses(90, a, False, 64) // 2, addresses(90, b, False, 8) // 2
    halves[at_a[0, 0]], halves[at_a[1, 1]], halves[at_a[2, 2]] = one, inf, nan
    halves[at_b] = one
    halves[at_b[1]] = 0
    d = wgmma(8, True, (1, 1), (False, False), a, b, shared, False, np.zeros((64, 8), np.float32))
    assert d[0, 0] == 1 and d[0, 1] == 0 and d[1, 0] == np.inf and not d[3:].any()
    assert d[1, 1:2].view(np.uint32) == d[2, 0:1].view(np.uint32) == 0x7FFFFFFF


def test_products_that_break_a_rule() -> None:
    shared = np.zeros(2048, np.uint8)
    a = descriptor(90, 0, 16, 256, 32)
    d = np.zeros((64, 8), np.float32)
    wgmma(8, True, (1, 1), (False, False), a, a, shared, False, d)
    for n in (0, 4, 12, 264):
        with pytest.raises(Fault, match="N of"):
            wgmma(n, True, (1, 1), (False, False), a, a, shared, False, d)
    with pytest.raises(Fault, match="imm-scale"):
        wgmma(8, True, (1, 0), (False, False), a, a, shared, False, d)
    with pytest.raises(Fault, match="shared memory has 2048 bytes"):
        wgmma(
            8, True, (1, 1), (False, False), descriptor(90, 256, 16, 256, 32), a, shared, False, d
        )


# The chain ----------------------------------------------------------------------------------------


def test_attention_products() -> None:
    """Scores and output of the Hopper kernel: its boxes, descriptors and steps, head_dim 128."""
    rng = np.random.default_rng(2)
    query, key, value = (rounded(True, rng.standard_normal((n, 128))) for n in (64, 128, 128))
    shared = np.zeros(128 * 1024, np.uint8)
    places = (8192, 32 * 1024, 64 * 1024)
    sources = [from_float(True, x) for x in (query, key, value)]
    for bits, to in zip(sources, places, strict=True):
        matrix = aligned_bytes(bits.nbytes, 16).view(np.uint16).reshape(bits.shape)
        matrix[:] = bits
        load(matrix, len(bits), shared, to)
    scores = np.zeros((64, 128), np.float32)
    for k in range(8):
        a = descriptor(90, places[0] + k // 4 * 64 * 128 + k % 4 * 32, 16, 1024, 128)
        b = descriptor(90, places[1] + k // 4 * 128 * 128 + k % 4 * 32, 16, 1024, 128)
        scores = wgmma(128, True, (1, 1), (False, False), a, b, shared, k > 0, scores)
    np.testing.assert_allclose(scores, query.astype(np.float64) @ key.T, rtol=1e-5, atol=1e-5)

    weights = from_float(True, scores)
    output = np.zeros((64, 128), np.float32)
    for k in range(8):
        # The fragment of D is that of A: registers 4 k ... of 16 columns are packed in pairs.
        registers = np.zeros((128, 4), np.uint32)
        for thread, r in itertools.product(range(128), range(4)):
            low, high = (int(weights[d_place(thread, 8 * k + 2 * r + i)]) for i in (0, 1))
            registers[thread, r] = high << 16 | low
        b = descriptor(90, places[2] + k * 16 * 128, 128 * 128, 1024, 128)
        output = wgmma(128, True, (1, 1), (False, True), registers, b, shared, True, output)
    expected = to_float(True, weights).astype(np.float64) @ value
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-3)
