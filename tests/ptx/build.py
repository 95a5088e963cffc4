"""Compiles the interpreter, and host code with its kernels' PTX against it; keeps what it has built."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "ptx"
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc")

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


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time: test workers start together, and what one builds all use."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
    with _alone():
        for source in sorted((HERE / "core").glob("*.cpp")):
            made = CACHE / "core" / f"{source.stem}-{_key(CXX_FLAGS, source, *headers)}.o"
            objects.append(_make(made, [CXX, *CXX_FLAGS, "-c", source, "-o"]))
        library = CACHE / f"core-{_key(CXX_FLAGS, *parts)}" / "libptx.so"
        return _make(library, [CXX, "-shared", *objects, "-o"])


def kernels(folder: Path, architecture: str, host: Path | None = None) -> Path:
    """The host code and the PTX of an architecture's kernels, bound to the interpreter.

    Args:
        folder: csrc/sm90, for example.
        architecture: of the PTX, for example compute_90a.
        host: another csrc, of which cuda/host.cu and its headers are taken; it may go away
            afterwards.

    Raises:
        RuntimeError: there is no nvcc.
    """
    if NVCC is None:
        raise RuntimeError("the kernels' PTX needs nvcc")
    runtime = interpreter()
    version = subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout
    flags = [*NVCC_FLAGS, "-gencode", f"arch={architecture},code={architecture}"]

    def made_of(csrc: Path, pattern: str) -> list[Path]:
        parts = [csrc / part for part in ("include", "cuda", folder.name)]
        key = _key(version, flags, *[source for part in parts for source in _sources(part)])
        into = CACHE / f"{folder.name}-{key}"
        command = [NVCC, "-c", *flags, f"-I{csrc / 'include'}"]
        return [
            _make(into / f"{source.stem}.o", [*command, source, "-o"])
            for source in sorted(csrc.glob(pattern))
        ]

    with _alone():
        of_host = made_of(host or folder.parent, "cuda/host.cu")
        objects = of_host + made_of(folder.parent, f"{folder.name}/kernels/*.cu")
        library = of_host[0].parent / f"{folder.name}-{runtime.parent.name}.so"
        link = [CXX, "-shared", *objects, runtime, f"-Wl,-rpath,{runtime.parent}", "-o"]
        return _make(library, link)
