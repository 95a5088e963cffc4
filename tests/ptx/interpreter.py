"""The PTX interpreter from Python: kernels by their text, and libraries whose launches it runs."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from ptx import build
from torch import Tensor

MOST_INSTRUCTIONS = 200_000_000


class PtxError(RuntimeError):
    """A rule that a program has broken: the instruction with its line, then the state of all warps."""


@dataclass(frozen=True)
class Counts:
    """What launches have done: instructions of warps, products of a tensor core, boxes copied."""

    instructions: int
    products: int
    loads: int
    stores: int


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build.interpreter()), mode=ctypes.RTLD_GLOBAL)
    loaded.ptx_message.restype = c_char_p
    loaded.ptx_module_text.restype = c_char_p
    loaded.ptx_configure.argtypes = [c_uint64, c_uint64, c_int, c_int, c_int]
    loaded.ptx_register_memory.argtypes = [c_uint64, c_uint64, c_int]
    loaded.ptx_run.argtypes = [c_char_p, c_char_p, *[c_uint32] * 3, c_char_p, c_uint64]
    pointers = [c_void_p] * 4
    numbers = [c_uint32, c_uint32, c_uint64]
    loaded.ptx_encode_tensor_map.argtypes = [c_void_p, *numbers, *pointers, c_uint32]
    return loaded


def configure(
    seed: int = 0,
    multiprocessors: int = 1,
    capability: tuple[int, int] = (9, 0),
    most_instructions: int = MOST_INSTRUCTIONS,
) -> None:
    """Begins anew: no memory is registered, no error pending.

    Args:
        seed: of the schedules. All that is random follows from it.
        multiprocessors: what the host code is told.
        capability: what the host code is told.
        most_instructions: of all warps together, before a launch counts as endless.
    """
    _library().ptx_configure(seed, most_instructions, multiprocessors, *capability)


def register(tensor: Tensor | np.ndarray, writable: bool = False) -> None:
    """Lets kernels access the memory of a tensor, all of its storage, and nothing around it."""
    if isinstance(tensor, Tensor):
        storage = tensor.untyped_storage()
        address, count = storage.data_ptr(), storage.nbytes()
    else:
        address, count = tensor.ctypes.data, tensor.nbytes
    _library().ptx_register_memory(address, count, writable)


def counts() -> Counts:
    numbers = (c_uint64 * 4)()
    _library().ptx_statistics(numbers)
    return Counts(*numbers)


def message() -> str:
    return str(_library().ptx_message().decode())


def run(
    text: str,
    kernel: str = "kernel",
    *,
    blocks: int = 1,
    threads: int = 32,
    dynamic_shared: int = 0,
    parameters: bytes = b"",
) -> None:
    """Runs a kernel of a PTX module.

    Args:
        text: the module.
        kernel: the entry's name.
        blocks: of the grid.
        threads: of a block, a multiple of 32.
        dynamic_shared: bytes.
        parameters: laid out as the entry declares them.

    Raises:
        PtxError: the program breaks a rule, or contains what is not modeled.
    """
    code = _library().ptx_run(
        text.encode(), kernel.encode(), blocks, threads, dynamic_shared, parameters, len(parameters)
    )
    if code != 0:
        raise PtxError(message())


def tensor_map(
    tensor: Tensor,
    box: Sequence[int],
    *,
    data_type: int,
    steps: Sequence[int] | None = None,
    swizzle: int = 0,
) -> bytes:
    """The 128 bytes that cuTensorMapEncodeTiled makes for a tensor, innermost dimension last.

    Args:
        tensor: its last dimension contiguous.
        box: extents, innermost first.
        data_type: of CUtensorMapDataType.
        steps: element strides, innermost first; ones by default.
        swizzle: of CUtensorMapSwizzle.

    Raises:
        PtxError: the driver would decline.
    """
    rank = tensor.dim()
    extents = (c_uint64 * rank)(*reversed(tensor.shape))
    strides = (c_uint64 * rank)(
        *[s * tensor.element_size() for s in reversed(tensor.stride()[:-1])]
    )
    room = ctypes.create_string_buffer(128 + 64)
    address = (ctypes.addressof(room) + 63) // 64 * 64
    code = _library().ptx_encode_tensor_map(
        address,
        data_type,
        rank,
        tensor.data_ptr(),
        extents,
        strides,
        (c_uint32 * rank)(*box),
        (c_uint32 * rank)(*(steps or [1] * rank)),
        swizzle,
    )
    if code != 0:
        raise PtxError(message())
    return ctypes.string_at(address, 128)


class Library:
    """A folder of csrc whose launches the interpreter runs.

    Args:
        folder: for example csrc/sm90.
        architecture: of the PTX.
        host: another csrc, to take the host code from.
    """

    def __init__(self, folder: Path, architecture: str, host: Path | None = None) -> None:
        self._first_module = _library().ptx_modules()
        self.functions = ctypes.CDLL(str(build.kernels(folder, architecture, host)))

    def text(self, kernel: str) -> str:
        """The PTX of the module with a kernel whose mangled name has this part."""
        found = _library().ptx_module_text(kernel.encode(), self._first_module)
        assert found is not None, kernel
        return str(found.decode())

    def replace_text(self, kernel: str, text: str) -> None:
        """Has launches of such a kernel run another text."""
        replaced = _library().ptx_replace_module_text(
            kernel.encode(), self._first_module, text.encode()
        )
        assert replaced == 0, kernel
