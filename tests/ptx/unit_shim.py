"""The interpreter's units (tests/ptx/units) from Python: units/shim.cpp, compiled once a process."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

UNITS = Path(__file__).parent / "units"

# Arguments by letter: i int32, I uint32, Q uint64, q int64, f float, p a pointer. The result is an
# int that says of a fault, unless another letter (v for none) stands before the colon.
SIGNATURES = {
    "unit_message": "s:",
    "unit_to_float": "v:ippq",
    "unit_from_float": "v:ippq",
    "unit_pack": "I:iff",
    "unit_exp2": "v:ippq",
    "unit_swizzled": "I:II",
    "unit_encode": "i:pIIQppppIIIIp",
    "unit_load_box": "pppII",
    "unit_store_box": "pppII",
    "unit_box_touched": "ppIpppppI",
    "unit_smem_addresses": "iQiIIIp",
    "unit_smem_touched": "iQiIIppI",
    "unit_wgmma_d_place": "v:IIp",
    "unit_wgmma_a_place": "v:IIIp",
    "unit_wgmma": "IiiiiipQQpIip",
    "unit_tensor_memory": "p:",
    "unit_tensor_memory_end": "v:p",
    "unit_allocate": "pIp",
    "unit_deallocate": "pII",
    "unit_relinquish": "v:p",
    "unit_check_all_freed": "p",
    "unit_poison": "v:pIIII",
    "unit_tensor_load": "piIiIIp",
    "unit_tensor_store": "piIiIIp",
    "unit_tensor_access": "iIiIIpp",
    "unit_tensor_write": "v:pIIIp",
    "unit_tensor_read": "pIIIp",
    "unit_decode_instruction": "Ip",
    "unit_mma": "ppIIIiQQi",
    "unit_mma_touched": "IIIppp",
}
TYPES: dict[str, Any] = {
    "i": ctypes.c_int32,
    "I": ctypes.c_uint32,
    "Q": ctypes.c_uint64,
    "q": ctypes.c_int64,
    "f": ctypes.c_float,
    "p": ctypes.c_void_p,
    "s": ctypes.c_char_p,
    "v": None,
}


class Fault(Exception):
    """What a unit says of a program that breaks a rule."""


@functools.cache
def library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tempfile.mkdtemp(prefix="gna-units-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "units.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(UNITS / "shim.cpp"), "-o", str(path)], check=True)
    found = ctypes.CDLL(str(path))
    for name, signature in SIGNATURES.items():
        result, _, arguments = signature.rpartition(":")
        function = getattr(found, name)
        function.argtypes = [TYPES[letter] for letter in arguments]
        function.restype = TYPES[result or "i"]
    return found


def call(name: str, *arguments: Any) -> Any:
    """Calls a function, arrays as pointers; one that may fault raises Fault or returns None."""
    signature = SIGNATURES[name]
    converted = [pointer(x) if isinstance(x, np.ndarray) else x for x in arguments]
    result = getattr(library(), name)(*converted)
    if ":" in signature:
        return result
    if result != 0:
        raise Fault(library().unit_message().decode())
    return None


def pointer(array: npt.NDArray[Any]) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def aligned_bytes(count: int, alignment: int) -> npt.NDArray[np.uint8]:
    """Zeroed bytes on a multiple of `alignment`."""
    raw = np.zeros(count + alignment, np.uint8)
    first = -raw.ctypes.data % alignment
    return raw[first : first + count]
