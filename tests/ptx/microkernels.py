"""Kernels of a few lines of PTX, for tests of single instructions."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch
from ptx import interpreter
from torch import Tensor

# Ends a kernel: thread t stores %r1 at out[t].
STORE = """
mul.wide.u32 %rd1, %r0, 4;
add.s64 %rd1, %rd0, %rd1;
st.global.u32 [%rd1], %r1;
ret;
"""

# Waits for parity %r3 of the mbarrier at the shared address in %r2.
WAIT = """
{
.reg .pred done;
retry:
mbarrier.try_wait.parity.shared::cta.b64 done, [%r2], %r3;
@done bra end;
bra retry;
end:
}
"""

BF16, SWIZZLE_128 = 9, 3  # of CUtensorMapDataType and CUtensorMapSwizzle


def module(body: str, *, maps: int = 0, target: str = "sm_90a") -> str:
    """A module with the entry "kernel"(map0, ..., out): %r0 is the thread, %rd0 is out, `raw` is the
    dynamic shared memory, on a multiple of 1024."""
    parameters = "".join(f".param .align 64 .b8 map{i}[128], " for i in range(maps))
    return f"""
.version 9.0
.target {target}
.address_size 64
.extern .shared .align 1024 .b8 raw[];
.visible .entry kernel({parameters}.param .u64 out)
{{
.reg .pred %p<10>;
.reg .b16 %rs<20>;
.reg .b32 %r<300>;
.reg .b64 %rd<40>;
.reg .f32 %f<300>;
ld.param.u64 %rd0, [out];
mov.u32 %r0, %tid.x;
{body}
}}
"""


def execute(
    body: str,
    *,
    threads: int = 32,
    shared: int = 4096,
    tensors: Sequence[Tensor] = (),
    maps: Sequence[bytes] = (),
    words: int = 0,
    target: str = "sm_90a",
    schedule: int = 0,
) -> np.ndarray:
    """Runs a body and returns what it has stored.

    Args:
        body: see `module`.
        threads: of the one block.
        shared: bytes of dynamic shared memory.
        tensors: what maps describe; the kernel may write them.
        maps: of tensors, parameters map0 and so on.
        words: of 32 bits that the kernel may store at %rd0; by default one a thread.
        target: of the module.
        schedule: its seed.

    Raises:
        interpreter.PtxError: the body breaks a rule.
    """
    out = np.full(words or threads, 0xDEADBEEF, dtype=np.uint32)
    interpreter.configure(schedule)
    interpreter.register(out, writable=True)
    for tensor in tensors:
        interpreter.register(tensor, writable=True)
    interpreter.run(
        module(body, maps=len(maps), target=target),
        threads=threads,
        dynamic_shared=shared,
        parameters=b"".join(maps) + struct.pack("<Q", out.ctypes.data),
    )
    return out


def numbered(rows: int, columns: int) -> Tensor:
    """bf16 [rows, columns], each element a number that bf16 holds and that tells row and column."""
    return (torch.arange(rows)[:, None] % 16 + torch.arange(columns) / 128).bfloat16()
