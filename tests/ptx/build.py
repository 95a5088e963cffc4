"""Compiles the interpreter, and host code with its kernels' PTX against it; keeps what it has built."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "ptx"
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc")
INCLUDE = ROOT / "csrc" / "include"

# No contraction: an FMA that the PTX does not ask for rounds otherwise.
CXX_FLAGS = (
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-fwrapv",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
)
NVCC_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--no-compress", "-Xcompiler", "-fPIC")


def _key(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _sources(folder: Path) -> list[Path]:
    suffixes = {".h", ".cpp", ".cu", ".cuh", ".hpp"}
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes)


def _make(made: Path, command: Sequence[object]) -> Path:
    """Runs a command whose last argument is to be the file, unless the file exists."""
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        draft = made.with_name(f"{os.getpid()}-{made.name}")
        subprocess.run([*map(str, command), str(draft)], check=True)
        draft.rename(made)
    return made


def interpreter() -> Path:
    """The interpreter as a shared library.

    Raises:
        RuntimeError: there is no C++ compiler.
    """
    if CXX is None:
        raise RuntimeError("the PTX interpreter needs a C++ compiler")
    parts = _sources(HERE / "core") + _sources(HERE / "units")
    headers = [part for part in parts if part.suffix == ".h"]
    objects = []
    for source in sorted((HERE / "core").glob("*.cpp")):
        made = CACHE / "core" / f"{source.stem}-{_key(CXX_FLAGS, source, *headers)}.o"
        objects.append(_make(made, [CXX, *CXX_FLAGS, "-c", source, "-o"]))
    library = CACHE / f"core-{_key(CXX_FLAGS, *parts)}" / "libptx.so"
    return _make(library, [CXX, "-shared", *objects, "-o"])


def kernels(folder: Path, architecture: str) -> Path:
    """The host code and the PTX of all .cu files of a folder, bound to the interpreter.

    Args:
        folder: csrc/sm90, for example.
        architecture: of the PTX, for example compute_90a.

    Raises:
        RuntimeError: there is no nvcc.
    """
    if NVCC is None:
        raise RuntimeError("the kernels' PTX needs nvcc")
    runtime = interpreter()
    sources = sorted(folder.glob("*.cu"))
    flags = [*NVCC_FLAGS, "-gencode", f"arch={architecture},code={architecture}"]
    key = _key(flags, *_sources(folder), *_sources(INCLUDE))
    objects = []
    for source in sources:
        made = CACHE / f"{folder.name}-{key}" / f"{source.stem}.o"
        objects.append(_make(made, [NVCC, "-c", *flags, f"-I{INCLUDE}", source, "-o"]))
    library = CACHE / f"{folder.name}-{key}" / f"{folder.name}-{runtime.parent.name}.so"
    return _make(library, [CXX, "-shared", *objects, runtime, f"-Wl,-rpath,{runtime.parent}", "-o"])
