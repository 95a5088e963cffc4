"""The Blackwell kernel: what it compiles to and, on a Blackwell GPU, what it computes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from disassembly import functions_of
from kernel_problems import NVCC, PROBLEMS_PER_BLOCK, ROOT, RandomProblem, assert_right

from benchmarks import blackwell_model
from gna_compile.geometry import Neighborhood
from gna_compile.planner import PlanError, Workload, plan
from gna_compile.providers.cuda.library import library
from gna_compile.providers.cuda.provider import current_capability

needs_blackwell = pytest.mark.skipif(
    library("sm100") is None or current_capability() not in ((10, 0), (10, 3)),
    reason="needs the CUDA kernels and a GPU of compute capability 10.0 or 10.3",
)

KERNELS = ("bf16_64", "bf16_128", "fp16_64", "fp16_128")


class Compiled(NamedTuple):
    """What nvcc makes of a kernel's source file, and says of it."""

    head_dim: int
    notices: str
    cubin: Path


@pytest.fixture(scope="module", params=KERNELS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    if NVCC is None:
        pytest.skip("needs nvcc")
    cubin = tmp_path_factory.mktemp("sm100") / "kernel.cubin"
    command = [
        *(NVCC, "-std=c++17", "-O3", "-DNDEBUG", "-cubin", "-Xptxas", "-v"),
        *("-gencode", "arch=compute_100f,code=sm_100f", f"-I{ROOT / 'csrc/include'}"),
        *(str(ROOT / f"csrc/sm100/kernels/{request.param}.cu"), "-o", str(cubin)),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    notices = run.stdout + run.stderr
    if "Unsupported gpu architecture" in notices:
        pytest.skip("this nvcc does not know sm_100f")
    assert run.returncode == 0, notices
    head_dim = int(request.param.rpartition("_")[2])
    return Compiled(head_dim, notices, cubin)


def test_nothing_is_spilled(compiled: Compiled) -> None:
    assert compiled.notices.count(" 0 bytes spill stores, 0 bytes spill loads") == 2
    assert compiled.notices.count("Used 128 registers") == 2


def test_matrix_unit_and_tensor_memory_are_used(compiled: Compiled) -> None:
    functions = functions_of(compiled.cubin)
    assert len(functions) == 2
    for code in functions.values():
        products = [line for line in code if "UTCHMMA" in line]
        # Both halves: one product for 16 columns of the head, one for 16 keys.
        assert len(products) == 2 * (compiled.head_dim // 16 + 128 // 16)
        # The weights of the second one come from tensor memory.
        assert sum("UTCHMMA tmem" in line for line in products) == 2 * 128 // 16
        assert any("LDTM.x32" in line for line in code)
        assert any("STTM.x16" in line for line in code)


def test_roles_keep_to_their_registers(compiled: Compiled) -> None:
    expected = [208, 56, 40] if compiled.head_dim == 64 else [200, 64, 48]
    # Two warpgroups soften, one finishes, one does the rest.
    assert 128 * (2 * expected[0] + expected[1] + expected[2]) == 65536
    for code in functions_of(compiled.cubin).values():
        limit, limits = 128, []
        for line in code:
            if found := re.search(r"USETMAXREG\.\S+.*?(0x[0-9a-f]+)", line):
                limit = int(found[1], 16)
                limits.append(limit)
            if len(limits) < 3:  # what follows the roles is not in order
                numbers = [int(number) for number in re.findall(r"\bR(\d+)\b", line)]
                assert max(numbers, default=0) < limit, line
        assert limits == expected


@pytest.mark.parametrize(("head_dim", "exponentials"), [(64, 80), (128, 104)])
def test_a_key_tile_costs_what_the_model_says(head_dim: int, exponentials: int) -> None:
    try:
        step = blackwell_model.step_of(head_dim)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert step.full["MUFU"] == exponentials
    assert step.full["FMNMX3"] < 70  # one for two scores
    assert step.full.total() < 128 * 5
    # A mask takes 1.3 instructions a score, once its words are there.
    assert (step.partial - step.full).total() < 128 * 1.5


def test_a_dilated_query_box_is_read_in_two_halves() -> None:
    # 256 tokens would be 512 from end to end.
    cut = plan(Workload(Neighborhood.of((4096,), (64,), dilation=(2,))), "sm100")
    assert (cut.query_box, cut.key_box) == ((256,), (128,))
    with pytest.raises(PlanError, match="no box of 256 tokens can be read with dilation 3"):
        plan(Workload(Neighborhood.of((4096,), (64,), dilation=(3,))), "sm100")


@needs_blackwell
@pytest.mark.parametrize("block", range(12))
def test_random_problems(block: int) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        for index in range(PROBLEMS_PER_BLOCK):
            assert_right(RandomProblem(block * PROBLEMS_PER_BLOCK + index), "sm100")
    finally:
        torch.use_deterministic_algorithms(False)


@needs_blackwell
@pytest.mark.parametrize("block", range(4))
def test_what_is_hidden_may_be_anything(block: int) -> None:
    for seed in range(1000 + 10 * block, 1010 + 10 * block):
        problem = RandomProblem(seed)
        # A score of infinity times a scale of zero is another matter.
        problem.scale = problem.scale or None
        problem.plants = problem.rng.choice([1, 3, 30])
        assert_right(problem, "sm100")
