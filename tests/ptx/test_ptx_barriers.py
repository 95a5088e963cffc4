"""Barriers, races and the pool of registers in the interpreter."""

from __future__ import annotations

import pytest
from ptx import build, interpreter
from ptx.microkernels import STORE, WAIT, execute

pytestmark = pytest.mark.skipif(build.CXX is None, reason="needs a C++ compiler")

SCHEDULES = range(8)

# An mbarrier for `count` arrivals at raw, known to all of a block; %r2 is its address.
INIT = """
mov.u32 %r2, raw;
setp.ne.s32 %p9, %r0, 0;
@%p9 bra ready;
mbarrier.init.shared::cta.b64 [%r2], COUNT;
ready:
bar.sync 0;
"""

# %p8: the thread is in the first warp.
HALVES = INIT.replace("COUNT", "32") + "setp.lt.u32 %p8, %r0, 32;\n"

# The first warp hands one word a lane to the second.
HAND_OVER = (
    HALVES
    + """
mov.u32 %r3, 0;
and.b32 %r4, %r0, 31;
shl.b32 %r5, %r4, 2;
add.s32 %r5, %r5, %r2;
mov.u32 %r1, 0;
@!%p8 bra reader;
add.s32 %r6, %r4, 100;
st.shared.u32 [%r5+64], %r6;
mbarrier.arrive.shared::cta.b64 _, [%r2];
bra end;
reader:
"""
    + WAIT.replace("end", "done_waiting")
    + """
ld.shared.u32 %r1, [%r5+64];
end:
"""
    + STORE
)


def test_an_mbarrier_hands_over() -> None:
    for schedule in SCHEDULES:
        result = execute(HAND_OVER, threads=64, schedule=schedule)
        assert result.tolist() == [0] * 32 + [100 + t for t in range(32)]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("mov.u32 %r3, 0;", "mov.u32 %r3, 1;", "nothing has written|without a synchronization"),
        ("b64 [%r2], 32;", "b64 [%r2], 33;", "deadlock"),
        ("b64 [%r2], 32;", "b64 [%r2], 31;", "without a synchronization"),
        ("ready:\nbar.sync 0;", "ready:", "there is no mbarrier|initialized without"),
        ("ld.shared.u32 %r1, [%r5+64]", "ld.shared.u32 %r1, [%r5]", "part of an mbarrier"),
        ("_, [%r2];", "_, [%r2+4];", "not a multiple of 8"),
        ("_, [%r2];", "_, [%r2+8];", "there is no mbarrier"),
        ("_, [%r2];", "_, [%r2], 2;", "deadlock|without a synchronization"),
    ],
)
def test_misuse_of_an_mbarrier(old: str, new: str, says: str) -> None:
    assert old in HAND_OVER
    with pytest.raises(interpreter.PtxError, match=says):
        for schedule in SCHEDULES:
            execute(HAND_OVER.replace(old, new, 1), threads=64, schedule=schedule)


def test_races_are_errors_whatever_the_schedule() -> None:
    """Both orders of a write and a read, in one warp and in two."""
    across = "mov.u32 %r2, raw; setp.ne.s32 %p1, %r0, 0; setp.ne.s32 %p2, %r0, LANE;"
    race = across + "@!%p1 st.shared.u32 [%r2], 7; SYNC @!%p2 ld.shared.u32 %r1, [%r2]; ret;"
    for lane, sync in ((40, "bar.sync 0;"), (5, "bar.warp.sync -1;")):
        body = race.replace("LANE", str(lane))
        for schedule in SCHEDULES:
            execute(body.replace("SYNC", sync), threads=64, schedule=schedule)
            with pytest.raises(interpreter.PtxError, match=r"written|has read"):
                execute(body.replace("SYNC", ""), threads=64, schedule=schedule)


def test_named_barriers_count_threads() -> None:
    body = """
        mov.u32 %r2, raw;
        shl.b32 %r3, %r0, 2;
        add.s32 %r3, %r3, %r2;
        setp.ge.u32 %p1, %r0, 32;
        @%p1 bra second;
        st.shared.u32 [%r3], %r0;
        bar.arrive 3, 64;
        mov.u32 %r1, 9;
        bra end;
        second:
        bar.sync 3, 64;
        ld.shared.u32 %r1, [%r3+-128];
        end:
    """
    for schedule in SCHEDULES:
        result = execute(body + STORE, threads=64, schedule=schedule)
        assert result.tolist() == [9] * 32 + list(range(32))
    with pytest.raises(interpreter.PtxError, match="a named barrier of 96 threads"):
        execute(body.replace("3, 64", "3, 96") + STORE, threads=64)
    with pytest.raises(interpreter.PtxError, match="deadlock"):
        execute(body.replace("bar.arrive 3, 64;", "") + STORE, threads=64)
    with pytest.raises(interpreter.PtxError, match=r"where others expect|a synchronization since"):
        execute(body.replace("sync 3, 64", "sync 3, 32") + STORE, threads=64, schedule=1)
    reduce = "setp.eq.s32 %p1, %r0, N; bar.red.or.pred %p2, 1, 64, %p1; selp.b32 %r1, 1, 0, %p2;"
    assert execute(reduce.replace("N", "40") + STORE, threads=64).tolist() == [1] * 64
    assert execute(reduce.replace("N", "64") + STORE, threads=64).tolist() == [0] * 64


def test_registers_come_from_a_pool() -> None:
    """384 threads have 168 registers each: what one warpgroup gives, another may take."""
    body = """
        setp.ge.u32 %p1, %r0, 128;
        @%p1 bra taker;
        setmaxnreg.dec.sync.aligned.u32 GIVES;
        ret;
        taker:
        setmaxnreg.inc.sync.aligned.u32 232;
        ret;
    """
    for schedule in SCHEDULES:
        execute(body.replace("GIVES", "40"), threads=384, schedule=schedule)
        with pytest.raises(interpreter.PtxError, match=r"waits for .* registers"):
            execute(body.replace("GIVES", "48"), threads=384, schedule=schedule)
