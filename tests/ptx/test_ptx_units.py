"""TMA and both tensor cores, driven by PTX."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ptx import build, interpreter
from ptx.microkernels import BF16, STORE, SWIZZLE_128, WAIT, execute, numbered
from torch import Tensor

pytestmark = pytest.mark.skipif(build.CXX is None, reason="needs a C++ compiler")

SCHEDULES = range(6)

# %r2: an mbarrier at raw for one arrival, and another 16 bytes further; %p9: all but the first thread.
PROLOGUE = """
mov.u32 %r2, raw;
mov.u32 %r3, 0;
setp.ne.s32 %p9, %r0, 0;
@%p9 bra ready;
mbarrier.init.shared::cta.b64 [%r2], 1;
mbarrier.init.shared::cta.b64 [%r2+16], 1;
fence.mbarrier_init.release.cluster;
ready:
bar.sync 0;
"""

# The first thread has 64 x 64 elements of map0 loaded to raw + 1024.
LOAD = """
add.s32 %r4, %r2, 1024;
mov.b64 %rd2, map0;
cvta.param.u64 %rd2, %rd2;
@%p9 bra loading;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 8192;
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
  [%r4], [%rd2, {C0, C1}], [%r2];
loading:
"""


def fails(
    execute_body: Callable[[str, int], object], body: str, old: str, new: str, says: str
) -> None:
    """An edit of a body is an error under some schedule."""
    assert old in body
    with pytest.raises(interpreter.PtxError, match=says):
        for schedule in SCHEDULES:
            execute_body(body.replace(old, new, 1), schedule)


# Copies ------------------------------------------------------------------------------------------

COPY_THERE_AND_BACK = (
    PROLOGUE
    + LOAD.replace("C0", "0").replace("C1", "-2")
    + WAIT
    + """
shl.b32 %r5, %r0, 2;
add.s32 %r5, %r5, %r4;
ld.shared.u32 %r1, [%r5+384];
bar.sync 0;
st.shared.u32 [%r5], 0x40004000;
fence.proxy.async.shared::cta;
bar.sync 0;
@%p9 bra done;
mov.b64 %rd3, map1;
cvta.param.u64 %rd3, %rd3;
cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd3, {0, 3}], [%r4];
cp.async.bulk.commit_group;
cp.async.bulk.wait_group.read 0;
done:
"""
    + STORE
)


def copy(body: str, schedule: int) -> tuple[Tensor, list[int]]:
    given = numbered(61, 64)
    written = torch.full((5, 64), torch.nan).bfloat16()
    maps = [
        interpreter.tensor_map(x, (64, rows), data_type=BF16, swizzle=SWIZZLE_128)
        for x, rows in ((given, 64), (written, 64))
    ]
    words = execute(
        body, shared=9216 + 1024, tensors=[given, written], maps=maps, schedule=schedule
    )
    return written, [int(x) for x in words]


def test_boxes_are_copied_swizzled_and_clipped() -> None:
    """Rows -2 and -1 are zeros; row 3 of shared memory has its 16-byte chunks xored with 3."""
    given = numbered(61, 64)
    # Word w of row 3 of the box holds words w ^ 12 of row 1 of the tensor: chunk c is at c ^ 3.
    words = given[1].view(torch.int32)
    for schedule in SCHEDULES:
        written, read = copy(COPY_THERE_AND_BACK, schedule)
        assert read == [int(words[w ^ 12]) for w in range(32)]
        # The tensor of five rows has row 0 of the box in its row 3, row 1 in its row 4; the first 32
        # words of the box were overwritten: all of row 0.
        assert written[:3].isnan().all()
        assert written[3].tolist() == [2.0] * 64
        assert written[4].tolist() == [0.0] * 64


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("fence.mbarrier_init.release.cluster;", "", "without a fence for TMA"),
        ("fence.proxy.async.shared::cta;", "", "without a fence.proxy.async"),
        ("shared::cta;\nbar.sync 0;", "shared::cta;", "without a synchronization"),
        ("[%r2], 8192;", "[%r2], 8176;", "deadlock"),
        ("[%r2], 8192;", "[%r2], 8208;", "deadlock"),
        ("cp.async.bulk.wait_group.read 0;", "", "may still read shared memory"),
        ("cp.async.bulk.commit_group;", "", "in no group"),
        ("add.s32 %r4, %r2, 1024;", "add.s32 %r4, %r2, 1040;", "not a multiple of 128"),
        ("mov.b64 %rd2, map0;", "mov.b64 %rd2, map0; add.s64 %rd2, %rd2, 64;", "not a tensor map"),
        ("tensor.2d.global", "tensor.3d.global", "not 3 coordinates"),
    ],
)
def test_misuse_of_the_copy_engine(old: str, new: str, says: str) -> None:
    fails(copy, COPY_THERE_AND_BACK, old, new, says)


def test_waiting_is_what_makes_a_copy_visible() -> None:
    fails(copy, COPY_THERE_AND_BACK, WAIT, "", "still going to write|without a synchronization")


def test_what_no_host_memory_holds_is_not_copied() -> None:
    larger = numbered(65, 64)
    described = interpreter.tensor_map(larger, (64, 64), data_type=BF16, swizzle=SWIZZLE_128)
    body = PROLOGUE + LOAD.replace("C0", "0").replace("C1", "1") + WAIT + "mov.u32 %r1, 0;" + STORE
    with pytest.raises(interpreter.PtxError, match="not in any global memory"):
        execute(body, shared=10240, tensors=[larger[:1].clone()], maps=[described])


# wgmma -------------------------------------------------------------------------------------------

# D[64 x 8] = A[64 x 16] B[8 x 16]^T, A and B the first 16 columns of the same 64 x 64 numbers.
ACCUMULATORS = "{%f1, %f2, %f3, %f4}"
WGMMA = (
    PROLOGUE
    + LOAD.replace("C0", "0").replace("C1", "0")
    + WAIT
    + """
mov.u32 %r5, %r4;
and.b32 %r5, %r5, 0x3ffff;
shr.u32 %r5, %r5, 4;
mov.b32 %r6, 0x40000040;
mov.b64 %rd4, {%r5, %r6};
mov.f32 %f1, 0f00000000;
mov.f32 %f2, 0f00000000;
mov.f32 %f3, 0f00000000;
mov.f32 %f4, 0f00000000;
setp.eq.s32 %p1, %r0, 1000;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 ACC, %rd4, %rd4, %p1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
mov.b32 %r1, %f4;
""".replace("ACC", ACCUMULATORS)
    + STORE
)


def multiply_on_hopper(body: str, schedule: int) -> Tensor:
    given = numbered(64, 64)
    described = interpreter.tensor_map(given, (64, 64), data_type=BF16, swizzle=SWIZZLE_128)
    words = execute(
        body, threads=128, shared=10240, tensors=[given], maps=[described], schedule=schedule
    )
    return torch.from_numpy(words.view("float32").copy())


def test_wgmma_multiplies() -> None:
    """The fourth register of thread 32 w + l is row 16 w + 8 + l / 4, column 2 (l % 4) + 1."""
    a = numbered(64, 64)[:, :16].float()
    product = a @ a[:8].T
    expected = [float(product[16 * (t // 32) + 8 + t % 32 // 4, t % 4 * 2 + 1]) for t in range(128)]
    for schedule in SCHEDULES:
        assert multiply_on_hopper(WGMMA, schedule).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("wgmma.fence.sync.aligned;", "", "no wgmma.fence before"),
        (
            "wgmma.fence.sync.aligned;",
            "wgmma.fence.sync.aligned; mov.f32 %f2, 0f3F800000;",
            "without a wgmma.fence since",
        ),
        ("wgmma.wait_group.sync.aligned 0;", "", "has not finished with"),
        ("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;", "not finished"),
        ("wgmma.commit_group.sync.aligned;", "", "not finished"),
        (WAIT, "", "still going to write|without a synchronization"),
        ("0x40000040", "0x40000041", "breaks the swizzle"),
        ("mov.u32 %r5, %r4;", "add.s32 %r5, %r4, 128;", "base offset"),
        ("setp.eq.s32 %p1, %r0, 1000;", "setp.eq.s32 %p1, %r0, 1;", "differs among the lanes"),
        ("m64n8k16", "m64n12k16", "operands|N of 12"),
        ("wgmma.fence.sync.aligned;", "@!%p9 bra over; wgmma.fence.sync.aligned; over:", "for all"),
    ],
)
def test_misuse_of_wgmma(old: str, new: str, says: str) -> None:
    fails(multiply_on_hopper, WGMMA, old, new, says)


# tcgen05 -----------------------------------------------------------------------------------------

# D[128 x 16] = A[128 x 16] B[16 x 16]^T: A and B the first columns of the same 128 x 64 numbers; thread
# t then reads columns 3 of row t. The descriptor: eight rows 1024 bytes apart, version 1, swizzle of
# 128 bytes. The instruction: fp32 accumulators, bf16, N = 16, M = 128.
FINISH = WAIT.replace("end", "finish").replace("[%r2]", "[%r2+16]")
TCGEN05 = (
    PROLOGUE.replace("bar.sync 0;", "")
    + """
add.s32 %r7, %r2, 8;
setp.ge.u32 %p8, %r0, 32;
@%p8 bra allocated;
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r7], 32;
tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
allocated:
tcgen05.fence::before_thread_sync;
bar.sync 0;
tcgen05.fence::after_thread_sync;
ld.shared.u32 %r8, [%r7];
"""
    + LOAD.replace("C0", "0").replace("C1", "0").replace("8192", "16384")
    + """
@%p9 bra issued;
"""
    + WAIT
    + """
and.b32 %r5, %r4, 0x3ffff;
shr.u32 %r5, %r5, 4;
mov.b32 %r6, 0x40004040;
mov.b64 %rd4, {%r5, %r6};
mov.b32 %r9, 0x8040490;
setp.ne.s32 %p1, %r0, %r0;
tcgen05.mma.cta_group::1.kind::f16 [%r8], %rd4, %rd4, %r9, %p1;
tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2+16];
issued:
mov.u32 %r3, 0;
"""
    + FINISH
    + """
tcgen05.fence::after_thread_sync;
shr.u32 %r10, %r0, 5;
shl.b32 %r10, %r10, 21;
add.s32 %r10, %r10, %r8;
tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r11, %r12, %r13, %r14}, [%r10];
tcgen05.wait::ld.sync.aligned;
mov.u32 %r1, %r14;
tcgen05.fence::before_thread_sync;
bar.sync 0;
@%p8 bra freed;
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r8, 32;
freed:
"""
    + STORE
)


def multiply_on_blackwell(body: str, schedule: int) -> Tensor:
    given = numbered(128, 64)
    described = interpreter.tensor_map(given, (64, 128), data_type=BF16, swizzle=SWIZZLE_128)
    words = execute(
        body,
        threads=128,
        shared=18432,
        tensors=[given],
        maps=[described],
        target="sm_100f",
        schedule=schedule,
    )
    return torch.from_numpy(words.view("float32").copy())


def test_tcgen05_multiplies() -> None:
    a = numbered(128, 64)[:, :16].float()
    expected = (a @ a[3]).tolist()
    for schedule in SCHEDULES:
        assert multiply_on_blackwell(TCGEN05, schedule).tolist() == pytest.approx(
            expected, rel=1e-6
        )


ANOTHER_STORE = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r10], {%r0};"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("tcgen05.wait::ld.sync.aligned;", "", "has not finished with"),
        ("\ntcgen05.fence::after_thread_sync;\nshr", "\nshr", "without what orders the two"),
        (FINISH, "", "without what orders the two|has not been written"),
        ("issued:\nmov.u32 %r3, 0;", "issued:\nmov.u32 %r3, 1;", "orders the two|not been written"),
        ("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r8, 32;", "", "ends with 32 columns"),
        (
            "before_thread_sync;\nbar.sync 0;\n@%p8 bra freed",
            "before_thread_sync;\n@%p8 bra freed",
            "may still",
        ),
        ("[%r7], 32;", "[%r7], 48;", "not a power of two"),
        ("shl.b32 %r10, %r10, 21;", "shl.b32 %r10, %r10, 20;", "may not access lane"),
        ("0x8040490", "0x8040090", "the type of A or B|factors of two types"),
        ("0x40004040", "0x40000040", "bits 46 to 48"),
        ("[%r8], %rd4", "[%r7], %rd4", "not allocated|has no lanes|starts at lane"),
        ("setp.ne.s32 %p1, %r0, %r0;", "setp.eq.s32 %p1, %r0, %r0;", "has not been written"),
        ("@%p9 bra issued;\n\n{", "{", "which is for one thread|for one thread"),
        (
            "mov.u32 %r1, %r14;",
            ANOTHER_STORE + "mov.u32 %r1, %r14;" + ANOTHER_STORE,
            "orders the two",
        ),
    ],
)
def test_misuse_of_tcgen05(old: str, new: str, says: str) -> None:
    fails(multiply_on_blackwell, TCGEN05, old, new, says)
