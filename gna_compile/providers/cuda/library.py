"""The CUDA kernels' shared libraries and their C interface; see csrc/cuda/api.h."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

BF16, FP16 = 1, 2
API_VERSION = 2


class TensorView(Structure):
    """gna_cuda_tensor."""

    _fields_ = [
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
    ]


class GridAxis(Structure):
    """gna_cuda_axis."""

    _fields_ = [
        (name, c_int32)
        for name in (
            "length",
            "window",
            "stride",
            "dilation",
            "causal",
            "log2_query_box",
            "log2_key_box",
        )
    ]


class NativeProblem(Structure):
    """gna_cuda_problem."""

    _fields_ = [
        ("type", c_int32),
        ("batch", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("axis_count", c_int32),
        ("axes", GridAxis * 3),
        ("prefix", c_int32),
        ("suffix", c_int32),
        ("global_begin", c_int32),
        ("global_end", c_int32),
        ("key_mask", c_void_p),
        ("key_mask_batch_stride", c_int64),
        ("key_mask_token_stride", c_int64),
        ("scale", c_float),
    ]


LAYOUT = (API_VERSION, *map(ctypes.sizeof, (TensorView, GridAxis, NativeProblem)))
"""What gna_layout of a library built from these sources says."""


@dataclass(frozen=True)
class Library:
    """The functions of one architecture's library.

    Attributes:
        path: of its file.
        declines: (batch, heads, tokens, tensor) -> why the kernel cannot read it, or None.
        forward: (problem, query, key, value, output, logsumexp, stream) -> 0 or an error's number.
        message: what went wrong in this thread's last call of `forward` that failed.
    """

    path: str
    declines: Callable[..., bytes | None]
    forward: Callable[..., int]
    message: Callable[[], bytes]


def library(name: str) -> Library | None:
    """The library "sm90" or "sm100", if it is usable. It loads without GPU and driver."""
    found = _find(name)
    return found if isinstance(found, Library) else None


def unusable(name: str) -> str | None:
    """Why there is no `library(name)`, or None if there is."""
    found = _find(name)
    return found if isinstance(found, str) else None


@lru_cache
def _find(name: str) -> Library | str:
    # An editable installation has the sources in one folder of the package, what is built in another.
    package = find_spec("gna_compile")
    folders = (package and package.submodule_search_locations) or ()
    places = [Path(folder) / f"_{name}.so" for folder in folders]
    built = [path for path in places if path.exists()]
    return load(built[0]) if built else "the CUDA kernel was not built"


def load(path: Path) -> Library | str:
    """A library by its file, or why it must not be called: its structs are laid out otherwise."""
    loaded = ctypes.CDLL(str(path))
    layout = (c_int32 * len(LAYOUT))()
    if hasattr(loaded, "gna_layout"):
        loaded.gna_layout(layout)
    if tuple(layout) != LAYOUT:
        return (
            f"{path} was built from other sources (version and sizes of its interface are "
            f"{tuple(layout)}, not {LAYOUT}): reinstall gna-compile"
        )
    declines, forward, message = (
        getattr(loaded, f"gna_{function}") for function in ("declines", "forward", "message")
    )
    tensor = POINTER(TensorView)
    declines.argtypes = [c_int32, c_int32, c_int32, tensor]
    declines.restype = c_char_p
    forward.argtypes = [POINTER(NativeProblem), *[tensor] * 4, c_void_p, c_void_p]
    forward.restype = c_int32
    message.argtypes = []
    message.restype = c_char_p
    return Library(str(path), declines, forward, message)
