"""The CUDA kernels' layouts beside CuTe's: descriptors, swizzles, fragments, tensor memory, tensor maps.

The programs in tests/kernels/cute include the kernels' headers and CuTe's, and run on the host. They call
the kernels' own functions, in which only inline PTX is replaced, and compare what CuTe makes of the same
tile.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from kernel_problems import NVCC, ROOT

HERE = Path(__file__).parent / "cute"


def cute_headers() -> Path | None:
    """The folder of headers in the package nvidia-cutlass."""
    package = importlib.util.find_spec("cutlass_library")
    for folder in (package and package.submodule_search_locations) or ():
        include = Path(folder) / "source" / "include"
        if (include / "cute" / "tensor.hpp").exists():
            return include
    return None


CUTE = cute_headers()

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="needs nvcc, for CUDA's headers"),
    pytest.mark.skipif(
        CUTE is None, reason="needs CuTe's headers: pip install --no-deps nvidia-cutlass"
    ),
]

COMPARISONS = {
    "sm90": (
        "score descriptors",
        "output descriptors",
        "probability operand",
        "bitmask fragment",
        "rows of threads",
        "mask by MMA",
        "output tile",
        "non-finite values",
        "interpreter",
    ),
    "sm100": (
        "smem descriptors",
        "instruction descriptors",
        "tensor memory operands",
        "softmax rows",
        "output tile",
        "non-finite values",
        "interpreter",
    ),
    "tensor_maps": ("map elements and swizzles", "map tensors", "map boxes"),
}


class Mutant(NamedTuple):
    """An edit of csrc, and the comparison that must notice it: the only one that reaches it."""

    program: str
    comparison: str
    file: str
    before: str
    after: str


MUTANTS = [
    Mutant("sm90", "score descriptors", "sm90/mainloop.cuh", "i % 4 * 32) >> 4", "i % 4 * 16) >> 4"),
    Mutant("sm90", "output descriptors", "sm90/mainloop.cuh", "tile_bytes, box_bytes);", "tile_bytes, 1024);"),
    Mutant("sm90", "probability operand", "sm90/softmax.cuh", "(scores[i], scores[i + 1]);", "(scores[i + 1], scores[i]);"),
    Mutant("sm90", "bitmask fragment", "sm90/mask.cuh", "+ n) + 2 * r + e]", "+ n) + r + 2 * e]"),
    Mutant("sm90", "rows of threads", "sm90/mainloop.cuh", "thread % 32 / 4;", "thread % 32 / 8;"),
    Mutant("sm90", "mask by MMA", "sm90/mask.cuh", "(chunk ^ key % 8)", "(chunk ^ key % 4)"),
    Mutant("sm90", "output tile", "sm90/epilogue.cuh", "^ (at % 8)", "^ (at / 2 % 8)"),
    Mutant("sm90", "non-finite values", "cuda/nonfinite.cuh", "/ 8 ^ key % 8;", "/ 8 ^ key / 8 % 8;"),
    Mutant("sm100", "smem descriptors", "sm100/tcgen05.cuh", "2u << 29 | 1u << 14 | 1024 >> 4", "2u << 29 | 1u << 14 | 512 >> 4"),
    Mutant("sm100", "instruction descriptors", "sm100/tcgen05.cuh", "1u << 16 : 0u", "1u << 15 : 0u"),
    Mutant("sm100", "tensor memory operands", "sm100/mainloop.cuh", "half.scores + 8 * k", "half.scores + 16 * k"),
    Mutant("sm100", "softmax rows", "sm100/mainloop.cuh", "in_scores + 16 * part", "in_scores + 8 * part"),
    Mutant("sm100", "output tile", "sm100/epilogue.cuh", "/ 8 ^ row % 8;", "/ 8 ^ row % 4;"),
    Mutant("sm100", "non-finite values", "cuda/nonfinite.cuh", "/ 8 ^ key % 8;", "/ 8 ^ key % 4;"),
    Mutant("tensor_maps", "map elements and swizzles", "cuda/host.cu", "CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_SWIZZLE_64B"),
    Mutant("tensor_maps", "map tensors", "cuda/host.cu", "problem.prefix + inner", "problem.prefix"),
    Mutant("tensor_maps", "map boxes", "cuda/host.cu", "box[a + 1] = view.extents[a] *", "box[a + 1] = view.extents[2 - a] *"),
]  # fmt: skip


class Result(NamedTuple):
    compared: int
    different: int
    first: str


class Programs:
    """Compiles and runs each program once a session, whichever worker asks first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def results(self, program: str, mutants: bool = False) -> dict[str, Result]:
        made = self.folder / f"{program}{'-mutants' * mutants}.txt"
        with made.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                made.write_text(self.run(program, mutants))
        lines = [line.split("\t") for line in made.read_text().splitlines()]
        return {line[0]: Result(int(line[1]), int(line[2]), line[3]) for line in lines}

    def run(self, program: str, mutants: bool) -> str:
        binary = self.folder / f"{program}{'-mutants' * mutants}"
        csrc, flags = ROOT / "csrc", ["-std=c++17", "-O1"]
        if mutants:
            csrc = self.folder / f"{program}-csrc"
            shutil.copytree(ROOT / "csrc", csrc)
            flags.append("-DGNA_ONE_KERNEL")
            for mutant in MUTANTS:
                if mutant.program == program:
                    file = csrc / mutant.file
                    text = file.read_text()
                    assert text.count(mutant.before) == 1, mutant
                    file.write_text(text.replace(mutant.before, mutant.after))
        includes = [f"-I{csrc}", f"-I{csrc / 'include'}", "-isystem", str(CUTE)]
        command = [str(NVCC), *flags, *includes, str(HERE / f"{program}.cpp"), "-o", str(binary)]
        subprocess.run(command, check=True)
        return subprocess.run([binary], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cute"
    folder.mkdir(exist_ok=True)
    return Programs(folder)


@pytest.mark.parametrize(
    ("program", "comparison"),
    [(program, name) for program, names in COMPARISONS.items() for name in names],
)
def test_layouts_are_cutes(programs: Programs, program: str, comparison: str) -> None:
    results = programs.results(program)
    assert set(results) == set(COMPARISONS[program])
    assert results[comparison].compared > 0
    assert results[comparison].different == 0, results[comparison].first


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.program}-{m.comparison}")
def test_every_comparison_notices_its_mutant(programs: Programs, mutant: Mutant) -> None:
    assert programs.results(mutant.program, mutants=True)[mutant.comparison].different > 0
