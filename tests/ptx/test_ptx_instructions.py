"""Ordinary instructions in the interpreter, and what it says of programs that it cannot run."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import build, interpreter
from ptx.microkernels import STORE, execute, module

pytestmark = pytest.mark.skipif(build.CXX is None, reason="needs a C++ compiler")


def bits(*numbers: float) -> list[int]:
    return [int(x) for x in np.array(numbers, dtype=np.float32).view(np.uint32)]


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ("add.s32 %r1, -7, 3;", 0xFFFFFFFC),
        ("mul.hi.u32 %r1, 0x80000000, 6;", 3),
        ("mad.lo.s32 %r1, -3, 5, 1;", 0xFFFFFFF2),
        ("div.s32 %r1, -7, 2;", 0xFFFFFFFD),
        ("rem.s32 %r1, -7, 2;", 0xFFFFFFFF),
        ("shl.b32 %r1, 1, 32;", 0),
        ("shr.s32 %r1, -8, 40;", 0xFFFFFFFF),
        ("shr.u32 %r1, 0x80000000, 31;", 1),
        ("min.s32 %r1, -1, 1;", 0xFFFFFFFF),
        ("min.u32 %r1, -1, 1;", 1),
        ("bfi.b32 %r1, 0xff, 0x1000, 4, 8;", 0x1FF0),
        ("prmt.b32 %r1, 0x44332211, 0x88776655, 0x7410;", 0x88552211),
        ("popc.b32 %r1, 0xf0f;", 8),
        ("cvt.s32.s8 %r1, 0x80;", 0xFFFFFF80),
        ("mul.wide.s32 %rd2, -2, 3; cvt.u32.u64 %r1, %rd2;", 0xFFFFFFFA),
        ("mul.wide.u16 %r1, 0xffff, 2;", 0x1FFFE),
        ("setp.lt.s32 %p1, -1, 0; selp.b32 %r1, 5, 6, %p1;", 5),
        ("setp.lt.u32 %p1, -1, 0; selp.b32 %r1, 5, 6, %p1;", 6),
        # NaN is not equal to itself; max passes a NaN by unless it is told to keep it.
        ("setp.neu.f32 %p1, 0f7FC00000, 0f7FC00000; selp.b32 %r1, 1, 0, %p1;", 1),
        ("setp.ne.f32 %p1, 0f7FC00000, 0f7FC00000; selp.b32 %r1, 1, 0, %p1;", 0),
        ("max.f32 %f1, 0f7FC00000, 0fBF800000; mov.b32 %r1, %f1;", bits(-1)[0]),
        ("max.NaN.f32 %f1, 0f7FC00000, 0fBF800000; mov.b32 %r1, %f1;", 0x7FFFFFFF),
        ("max.f32 %f1, 0f80000000, 0f00000000; mov.b32 %r1, %f1;", 0),
        ("fma.rn.f32 %f1, 0f40000000, 0f40400000, 0f3F800000; mov.b32 %r1, %f1;", bits(7)[0]),
        ("ex2.approx.ftz.f32 %f1, 0fC0000000; mov.b32 %r1, %f1;", bits(0.25)[0]),
        ("div.approx.f32 %f1, 0f3F800000, 0f7F7FFFFF; mov.b32 %r1, %f1;", 0),
        ("cvt.rn.bf16x2.f32 %r1, 0f3F800000, 0fC0000000;", 0x3F80C000),
        ("cvt.rn.f16x2.f32 %r1, 0f3F800000, 0fC0000000;", 0x3C00C000),
        # 1 + 2^-8 lies between two bf16 numbers and goes to the even one.
        ("cvt.rn.bf16x2.f32 %r1, 0f3F808000, 0f3F818000;", 0x3F803F82),
        (
            "mov.b64 %rd2, {0f3F800000, 0f40000000}; add.rn.f32x2 %rd2, %rd2, %rd2;"
            "mov.b64 {%r2, %r1}, %rd2;",
            bits(4)[0],
        ),
    ],
)
def test_one_instruction(instructions: str, expected: int) -> None:
    if "{0f3F800000, 0f40000000}" in instructions:
        instructions = "mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f40000000;" + instructions.replace(
            "{0f3F800000, 0f40000000}", "{%f1, %f2}"
        )
    assert execute(instructions + STORE).tolist() == [expected] * 32


def test_lanes_part_and_meet_again() -> None:
    body = """
        and.b32 %r2, %r0, 3;
        mov.u32 %r1, 0;
        again:
        add.s32 %r1, %r1, 10;
        sub.s32 %r2, %r2, 1;
        setp.ge.s32 %p1, %r2, 0;
        @%p1 bra again;
        bar.warp.sync -1;
        setp.eq.s32 %p2, %r0, 5;
        @!%p2 bra join;
        add.s32 %r1, %r1, 1;
        join:
        vote.sync.ballot.b32 %r3, %p2, -1;
        add.s32 %r1, %r1, %r3;
    """
    for schedule in range(4):
        result = execute(body + STORE, schedule=schedule)
        assert result.tolist() == [10 * (t % 4 + 1) + (t == 5) + 32 for t in range(32)]


def test_shuffles_and_votes() -> None:
    assert execute("shfl.sync.bfly.b32 %r1|%p1, %r0, 5, 31, -1;" + STORE).tolist() == [
        t ^ 5 for t in range(32)
    ]
    # Segments of four lanes: clamp 31 with the segment mask 28 in bits 8 up.
    assert execute("shfl.sync.idx.b32 %r1|%p1, %r0, 2, 0x1c1f, -1;" + STORE).tolist() == [
        t // 4 * 4 + 2 for t in range(32)
    ]
    up = (
        "shfl.sync.up.b32 %r1|%p1, %r0, 3, 0, -1; selp.b32 %r2, 100, 0, %p1; add.s32 %r1, %r1, %r2;"
    )
    assert execute(up + STORE).tolist() == [t - 3 + 100 if t >= 3 else t for t in range(32)]
    votes = "setp.gt.u32 %p1, %r0, 30; vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;"
    chosen = "selp.b32 %r1, 1, 0, %p2; selp.b32 %r2, 2, 0, %p3; or.b32 %r1, %r1, %r2;"
    assert execute(votes + chosen + STORE).tolist() == [1] * 32


def test_one_lane_is_elected_and_nobody_knows_which() -> None:
    body = "elect.sync _|%p1, -1; selp.b32 %r1, 1, 0, %p1;" + STORE
    leaders = set()
    for schedule in range(8):
        result = execute(body, schedule=schedule)
        assert result.sum() == 1
        leaders.add(int(result.argmax()))
    assert len(leaders) > 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("frob.b32 %r1, 1;", "unknown instruction"),
        ("add.sat.s32 %r1, %r0, 1;", "unknown type .sat"),
        ("max.xorsign.abs.f32 %f1, %f2, %f3;", "unknown modifier|missing"),
        ("add.s32 %r1, %r7, 1;", "reads %r7, which lanes ffffffff have not written"),
        ("ld.global.u32 %r1, [%rd0+4096];", "not in any global memory"),
        ("ld.global.u32 %r1, [%rd0+2];", "not a multiple of 4"),
        ("ld.param.u32 %r1, [out+8];", "the parameters have 8 bytes"),
        ("mov.u32 %r2, raw; ld.shared.u32 %r1, [%r2];", "nothing has written"),
        ("mov.u32 %r2, raw; st.shared.u32 [%r2+4096], %r0;", "shared memory has"),
        ("setp.eq.s32 %p1, %r0, 3; @%p1 bar.warp.sync -1;", "names lanes ffffffff"),
        ("setp.eq.s32 %p1, %r0, 3; @%p1 bar.sync 0;", "which is for all"),
        ("setmaxnreg.inc.sync.aligned.u32 256;", "deadlock"),
        ("setmaxnreg.dec.sync.aligned.u32 20;", "multiple of 8 from 24"),
    ],
)
def test_what_is_wrong_is_said(body: str, says: str) -> None:
    with pytest.raises(interpreter.PtxError, match=says):
        execute(body + "ret;")


def test_errors_name_the_line() -> None:
    text = module("mov.u32 %r2, raw;\nld.shared.u32 %r1, [%r2];\nret;")
    line = 1 + text.split("\n").index("ld.shared.u32 %r1, [%r2];")
    interpreter.configure()
    with pytest.raises(interpreter.PtxError, match=rf"warp 0, line {line}, ld.shared.u32 %r1"):
        interpreter.run(text, dynamic_shared=64, parameters=bytes(8))


def test_endless_kernels_end() -> None:
    interpreter.configure(most_instructions=10_000)
    with pytest.raises(interpreter.PtxError, match="more than the allowed instructions"):
        interpreter.run(module("again: bra again; ret;"), parameters=bytes(8))
