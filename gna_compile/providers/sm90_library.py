"""The Hopper kernel's shared library and its C interface; see csrc/sm90/gna_sm90.h."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import gna_compile

FILE = "_sm90.so"

BF16, FP16 = 1, 2


class TensorView(Structure):
    """gna_sm90_tensor."""

    _fields_ = [
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
    ]


class GridAxis(Structure):
    """gna_sm90_axis."""

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
    """gna_sm90_problem."""

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
        ("key_mask", c_void_p),
        ("key_mask_batch_stride", c_int64),
        ("key_mask_token_stride", c_int64),
        ("scale", c_float),
    ]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library, or None if it was not built. Loading it needs neither a GPU nor a driver."""
    # An editable installation has the sources in one folder of the package, what is built in another.
    built = [path for folder in gna_compile.__path__ if (path := Path(folder) / FILE).exists()]
    if not built:
        return None
    loaded = ctypes.CDLL(str(built[0]))
    tensor = POINTER(TensorView)
    loaded.gna_sm90_declines.argtypes = [c_int32, c_int32, c_int32, tensor]
    loaded.gna_sm90_declines.restype = c_char_p
    loaded.gna_sm90_forward.argtypes = [POINTER(NativeProblem), *[tensor] * 4, c_void_p, c_void_p]
    loaded.gna_sm90_forward.restype = c_int32
    loaded.gna_sm90_message.argtypes = []
    loaded.gna_sm90_message.restype = c_char_p
    return loaded
