"""The handshake with a CUDA library: its structs must be laid out as ctypes declares them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gna_compile.geometry import AttentionPattern, Neighborhood
from gna_compile.planner.architectures import SM90
from gna_compile.providers import Problem
from gna_compile.providers.cuda import library
from gna_compile.providers.cuda.library import LAYOUT, Library, load
from gna_compile.providers.cuda.provider import NativeCuda

ROOT = Path(__file__).resolve().parent.parent.parent
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

REST = """
const char* gna_declines(int, int, int, const gna_cuda_tensor*) { return nullptr; }
const char* gna_message() { return ""; }
int gna_forward(const gna_cuda_problem*, const gna_cuda_tensor*, const gna_cuda_tensor*,
                const gna_cuda_tensor*, const gna_cuda_tensor*, float*, void*) { return 0; }
"""
LAYOUT_OF_THE_HEADER = """
void gna_layout(int layout[4]) {
  layout[0] = GNA_CUDA_API_VERSION;
  layout[1] = sizeof(gna_cuda_tensor);
  layout[2] = sizeof(gna_cuda_axis);
  layout[3] = sizeof(gna_cuda_problem) + EXTRA;
}
"""


def built(folder: Path, layout: str, extra: int = 0) -> Path:
    source, made = folder / "stub.cpp", folder / "_stub.so"
    source.write_text('#include "api.h"\n' + layout + REST)
    flags = [f"-DEXTRA={extra}", "-shared", "-fPIC", f"-I{ROOT / 'csrc/cuda'}"]
    subprocess.run([str(CXX), *flags, str(source), "-o", str(made)], check=True)
    return made


def test_the_header_is_mirrored(tmp_path: Path) -> None:
    found = load(built(tmp_path, LAYOUT_OF_THE_HEADER))
    assert isinstance(found, Library), found
    assert found.message() == b""


def test_a_struct_of_another_size_is_told(tmp_path: Path) -> None:
    found = load(built(tmp_path, LAYOUT_OF_THE_HEADER, extra=8))
    assert isinstance(found, str)
    assert "built from other sources" in found and "reinstall" in found
    assert str(LAYOUT) in found


def test_a_library_older_than_the_handshake_is_told(tmp_path: Path) -> None:
    found = load(built(tmp_path, ""))
    assert isinstance(found, str) and "built from other sources" in found


def test_the_provider_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_find", lambda name: f"{name} was built from other sources")
    strides = [(512, 512, 64, 1)] * 3
    pattern = AttentionPattern.of_neighborhood(Neighborhood.of((8,), (8,)), 1)
    problem = Problem("cuda", torch.bfloat16, 1, 1, 1, 64, pattern, False, *strides)
    assert NativeCuda(SM90).supports(problem) == "sm90 was built from other sources"
