"""The Hopper kernel: on any machine which tiles it visits, on a Hopper GPU what it computes."""

from __future__ import annotations

import ctypes
import random
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from disassembly import functions_of
from kernel_problems import (
    NVCC,
    PROBLEMS_PER_BLOCK,
    ROOT,
    TOLERANCE,
    RandomProblem,
    assert_right,
    deviation,
    needs_hopper,
)
from torch import Tensor

from gna_compile import ops
from gna_compile.geometry import AttentionPattern, Neighborhood
from gna_compile.planner import PlanError, Workload, plan
from gna_compile.planner.architectures import SM90
from gna_compile.providers import Problem
from gna_compile.providers.cuda.library import library
from gna_compile.providers.cuda.provider import NativeCuda

BLOCKS = 12


CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if CXX is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("walk") / "walk.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'csrc/include'}"]
    subprocess.run(
        [CXX, *flags, str(ROOT / "tests/kernels/sm90_walk.cpp"), "-o", str(path)], check=True
    )
    return ctypes.CDLL(str(path)).walk_all


def random_boxes(rng: random.Random, rank: int, log2_tile: int) -> list[int]:
    boxes = [0] * rank
    for _ in range(log2_tile):
        boxes[rng.randrange(rank)] += 1
    return boxes


@pytest.mark.parametrize("block", range(8))
def test_tiles_and_masks_cover_exactly_what_is_visible(walker: Any, block: int) -> None:
    for seed in range(60 * block, 60 * block + 60):
        rng = random.Random(seed)
        rank = rng.choice([1, 2, 3])
        longest = {1: 70, 2: 14, 3: 6}[rank]
        names = ("grid", "window", "stride", "dilation", "causal")
        geometry: dict[str, Any] = {name: [] for name in names}
        log2_key = rng.choice([5, 6, 7])
        log2_tiles = (log2_key + rng.choice([0, 0, 1]), log2_key)  # of queries, of keys
        axes = [(1, 1, 1, 1, 0, 0, 0)] * (3 - rank)
        boxes = [random_boxes(rng, rank, log2_tile) for log2_tile in log2_tiles]
        for a in range(rank):
            length = rng.randint(1, longest)
            dilation = rng.choice([1, 1, rng.randint(1, min(length, 4))])
            window = rng.randint(1, length // dilation)
            values = (length, window, rng.randint(1, window), dilation, rng.random() < 0.3)
            for name, value in zip(names, values, strict=True):
                geometry[name].append(value)
            axes.append((*values, boxes[0][a], boxes[1][a]))
        prefix, suffix = (rng.choice([0, rng.randint(0, 40)]) for _ in range(2))
        visible = oracle.mask(**geometry, prefix=prefix, suffix=suffix).numpy()
        seen = np.zeros(visible.shape, dtype=np.uint8)
        numbers = [int(x) for axis in axes for x in axis]
        line = walker(
            (ctypes.c_int32 * 21)(*numbers),
            prefix,
            suffix,
            len(visible),
            seen.ctypes.data_as(ctypes.c_void_p),
        )
        assert line == 0, (line, seed)
        assert (seen == visible).all(), seed


def test_boxes_are_readable_and_cheapest_where_it_is_known() -> None:
    def boxes(*geometry: Any) -> tuple[Any, Any]:
        found = plan(Workload(Neighborhood.of(*geometry), heads=24), "sm90")
        return found.query_box, found.key_box

    assert boxes((30, 48, 80), (18, 24, 24), (16, 8, 8)) == ((2, 8, 8), (2, 8, 8))
    dilated = boxes((16, 44, 80), (16, 4, 16), (1, 1, 1), (1, 11, 5))
    assert dilated[0][1] == dilated[1][1] == 1
    with pytest.raises(PlanError, match="no box of 128 tokens can be read with dilation 16"):
        boxes((4096,), (64,), (1,), (16,))


def test_declines_say_why() -> None:
    def of(neighborhood: Neighborhood) -> AttentionPattern:
        return AttentionPattern.of_neighborhood(neighborhood, 4)

    def declined(**changes: Any) -> str | None:
        facts: dict[str, Any] = {
            "device": "cuda",
            "dtype": torch.bfloat16,
            "batch": 1,
            "heads": 4,
            "kv_heads": 4,
            "head_dim": 64,
            "pattern": of(Neighborhood.of((1024,), (64,))),
            "has_key_mask": False,
            **dict.fromkeys(
                ("query_strides", "key_strides", "value_strides"), (262144, 65536, 64, 1)
            ),
        }
        return NativeCuda(SM90).declines(Problem(**{**facts, **changes}))

    assert declined() is None
    assert "fp32" in (declined(dtype=torch.float32) or "") or "float32" in (
        declined(dtype=torch.float32) or ""
    )
    assert declined(head_dim=80) is None
    assert "head_dim 84" in (declined(head_dim=84) or "")
    assert "head_dim 136" in (declined(head_dim=136) or "")
    assert "contiguous" in (declined(key_strides=(262144, 65536, 1, 1024)) or "")
    assert "dilation" in (
        declined(pattern=of(Neighborhood.of((1024,), (16,), dilation=(16,)))) or ""
    )
    if library("sm90") is not None:
        assert "16 bytes" in (declined(value_strides=(262144, 65536, 65, 1)) or "")
    assert "cpu" in (
        NativeCuda(SM90).supports(
            Problem(
                "cpu",
                torch.bfloat16,
                1,
                1,
                1,
                64,
                of(Neighborhood.of((8,), (8,))),
                False,
                *[(512, 512, 64, 1)] * 3,
            )
        )
        or ""
    )


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("kernel", ["bf16_128", "bf16_64"])
def test_compiles_to_asynchronous_matrix_instructions(kernel: str, tmp_path: Path) -> None:
    cubin = tmp_path / "kernel.cubin"
    command = [
        *(str(NVCC), "-std=c++17", "-O3", "-DNDEBUG", "-cubin", "-Xptxas", "-v"),
        *("-gencode", "arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc/include'}"),
        *(str(ROOT / f"csrc/sm90/kernels/{kernel}.cu"), "-o", str(cubin)),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    notices = run.stdout + run.stderr
    if "Unsupported gpu architecture" in notices:
        pytest.skip("this nvcc does not know sm_90a")
    assert run.returncode == 0, notices
    # setmaxnreg ignored, or matrix instructions serialized.
    assert not re.search("C75(08|10|11)", notices), notices
    assert notices.count(" 0 bytes spill stores, 0 bytes spill loads") == 2, notices
    functions = functions_of(cubin)
    assert len(functions) == 2
    for code in functions.values():
        # One product for 16 columns of the head, one for 16 keys.
        assert (
            sum("HGMMA" in line for line in code) >= int(kernel[-3:].strip("_")) // 16 + 128 // 16
        )


@needs_hopper
@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_problems(block: int) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        for index in range(PROBLEMS_PER_BLOCK):
            assert_right(RandomProblem(block * PROBLEMS_PER_BLOCK + index))
    finally:
        torch.use_deterministic_algorithms(False)


@needs_hopper
@pytest.mark.parametrize("block", range(4))
def test_what_is_hidden_may_be_anything(block: int) -> None:
    for seed in range(1000 + 10 * block, 1010 + 10 * block):
        problem = RandomProblem(seed)
        # A score of infinity times a scale of zero is another matter.
        problem.scale = problem.scale or None
        problem.plants = problem.rng.choice([1, 3, 30])
        assert_right(problem)


def random_inputs() -> list[Tensor]:
    return [torch.randn(1, 2, 4096, 128, device="cuda").bfloat16() for _ in range(3)]


def assert_right_on_a_square(inputs: list[Tensor], window: int) -> None:
    """Of 64x64 tokens, under a window of this size along both axes."""
    sizes: dict[str, Any] = {"grid": (64, 64), "window": (window, window)}
    output = ops.neighborhood_attention(*inputs, **sizes, provider="sm90")
    assert isinstance(output, Tensor)
    expected = oracle.attention(*inputs, visible=oracle.mask(**sizes).cuda())[0]
    assert deviation(output, expected) < TOLERANCE[torch.bfloat16][0]


@needs_hopper
def test_huge_values_do_not_overflow() -> None:
    query, key, value = random_inputs()
    assert_right_on_a_square([query * 4, key, value * 1e36], window=9)


@needs_hopper
def test_scores_that_outgrow_every_weight() -> None:
    """A key far larger than those before it: its weight, beside their offset, is infinite."""
    query, key, value = random_inputs()
    key[:, :, 2048:] *= 60
    assert_right_on_a_square([query, key, value], window=33)


@needs_hopper
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_gpus_in_one_process() -> None:
    """Whatever the current device, on streams of one's own, and from a thread for each GPU at once."""
    geometry: dict[str, Any] = {"grid": (32, 48), "window": (9, 16), "stride": (1, 4)}
    devices = range(torch.cuda.device_count())
    inputs = [
        [torch.randn(1, 4, 32 * 48, 64, device=f"cuda:{d}").bfloat16() for _ in range(3)]
        for d in devices
    ]

    def attend(device: int) -> Tensor:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            output = ops.neighborhood_attention(*inputs[device], **geometry, provider="sm90")
        stream.synchronize()
        assert isinstance(output, Tensor) and output.device.index == device
        return output

    visible = oracle.mask(**geometry)
    outputs = []
    for device in devices:
        expected = oracle.attention(*inputs[device], visible=visible.to(f"cuda:{device}"))[0]
        for current in devices:
            with torch.cuda.device(current):
                output = attend(device)
                assert torch.cuda.current_device() == current
            assert deviation(output, expected) < TOLERANCE[torch.bfloat16][0]
        outputs.append(output)

    def repeat(device: int) -> bool:
        return all(torch.equal(attend(device), outputs[device]) for _ in range(50))

    with ThreadPoolExecutor(len(devices)) as pool:
        assert all(pool.map(repeat, devices))

    last = devices[-1]
    leaves = [x.clone().requires_grad_() for x in inputs[last]]
    result = ops.neighborhood_attention(*leaves, **geometry, provider="sm90")
    assert isinstance(result, Tensor)
    result.float().square().sum().backward()
    exact = [x.double().requires_grad_() for x in inputs[last]]
    oracle.attention(*exact, visible=visible.to(f"cuda:{last}"))[0].square().sum().backward()
    for leaf, true in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and true.grad is not None
        assert deviation(leaf.grad, true.grad) < 2e-2
