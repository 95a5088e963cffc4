"""The Hopper kernel: on any machine which tiles it visits, on a Hopper GPU what it computes."""

from __future__ import annotations

import ctypes
import math
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
from torch import Tensor

from gna_compile import ops
from gna_compile.geometry import Neighborhood
from gna_compile.planner import PlanError, Workload, plan
from gna_compile.providers import Problem
from gna_compile.providers.cuda_library import library
from gna_compile.providers.native_cuda import current_capability
from gna_compile.providers.sm90 import Sm90

BLOCKS = 12
PROBLEMS_PER_BLOCK = 30

# Largest ||error|| / ||expected||, and largest error of a logsumexp.
TOLERANCE = {torch.float16: (1.5e-3, 1e-3), torch.bfloat16: (8e-3, 1e-3)}

needs_hopper = pytest.mark.skipif(
    library("sm90") is None or current_capability() != (9, 0),
    reason="needs the CUDA kernels and a GPU of compute capability 9.0",
)


ROOT = Path(__file__).parent.parent
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc")


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if CXX is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("walk") / "walk.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'csrc/include'}"]
    subprocess.run([CXX, *flags, str(ROOT / "tests/sm90_walk.cpp"), "-o", str(path)], check=True)
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
    def declined(**changes: Any) -> str | None:
        facts: dict[str, Any] = {
            "device": "cuda",
            "dtype": torch.bfloat16,
            "batch": 1,
            "heads": 4,
            "kv_heads": 4,
            "head_dim": 64,
            "neighborhood": Neighborhood.of((1024,), (64,)),
            "has_key_mask": False,
            **dict.fromkeys(
                ("query_strides", "key_strides", "value_strides"), (262144, 65536, 64, 1)
            ),
        }
        return Sm90().declines(Problem(**{**facts, **changes}))

    assert declined() is None
    assert "fp32" in (declined(dtype=torch.float32) or "") or "float32" in (
        declined(dtype=torch.float32) or ""
    )
    assert declined(head_dim=80) is None
    assert "head size 84" in (declined(head_dim=84) or "")
    assert "head size 136" in (declined(head_dim=136) or "")
    assert "contiguous" in (declined(key_strides=(262144, 65536, 1, 1024)) or "")
    assert "dilation" in (
        declined(neighborhood=Neighborhood.of((1024,), (16,), dilation=(16,))) or ""
    )
    if library("sm90") is not None:
        assert "16 bytes" in (declined(value_strides=(262144, 65536, 65, 1)) or "")
    assert "cpu" in (
        Sm90().supports(
            Problem(
                "cpu",
                torch.bfloat16,
                1,
                1,
                1,
                64,
                Neighborhood.of((8,), (8,)),
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
        *(str(ROOT / f"csrc/sm90/forward_{kernel}.cu"), "-o", str(cubin)),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    notices = run.stdout + run.stderr
    if "Unsupported gpu architecture" in notices:
        pytest.skip("this nvcc does not know sm_90a")
    assert run.returncode == 0, notices
    # setmaxnreg ignored, or matrix instructions serialised.
    assert not re.search("C75(08|10|11)", notices), notices
    assert notices.count(" 0 bytes spill stores, 0 bytes spill loads") == 2, notices
    functions = functions_of(cubin)
    assert len(functions) == 2
    for code in functions.values():
        # One product for 16 columns of the head, one for 16 keys.
        assert (
            sum("HGMMA" in line for line in code) >= int(kernel[-3:].strip("_")) // 16 + 128 // 16
        )


class RandomProblem:
    """One problem, all of it drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        rank = rng.choice([1, 2, 2, 3, 3])
        longest = {1: 1500, 2: 40, 3: 13}[rank]
        self.geometry: dict[str, Any] = {
            name: [] for name in ("grid", "window", "stride", "dilation", "causal")
        }
        dilated = rng.random() < 0.3
        for _ in range(rank):
            length = rng.randint(1, longest)
            dilation = (
                rng.randint(1, min(length, 8 if rng.random() < 0.8 else 12)) if dilated else 1
            )
            window = rng.choice([rng.randint(1, length // dilation), length // dilation])
            stride = rng.choice([1, rng.randint(1, window), window])
            values = (length, window, stride, dilation, rng.random() < 0.2)
            for name, value in zip(self.geometry, values, strict=True):
                self.geometry[name].append(value)
        self.prefix = rng.choice([0, 0, rng.randint(0, 5), rng.randint(0, 300)])
        self.suffix = rng.choice([0, 0, rng.randint(0, 5), rng.randint(0, 300)])
        self.batch = rng.choice([1, 1, 2, 3])
        self.kv_heads = rng.choice([1, 2])
        self.heads = self.kv_heads * rng.choice([1, 1, 2, 3])
        self.head_dim = rng.choice([64, 128, 64, 128, 8 * rng.randint(1, 16)])
        self.dtype = rng.choice(list(TOLERANCE))
        self.scale = rng.choice([None, None, 0.3, 1.0, -0.1, 0.0])
        self.masks_keys = rng.random() < 0.4
        self.size = rng.choice([1.0, 1.0, 4.0])
        self.plants = 0  # how many values and keys are not finite

    def __repr__(self) -> str:
        return str({name: value for name, value in vars(self).items() if name != "rng"})

    def tensor(self, heads: int, tokens: int) -> Tensor:
        """Random values in one of the memory layouts that callers have; NaN around them."""
        batch, head_dim = self.batch, self.head_dim
        generator = torch.Generator("cuda").manual_seed(self.rng.getrandbits(40))

        def values(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device="cuda").to(self.dtype)

        layout = self.rng.choice(["BHSD", "BSHD", "SBHD", "fused", "padded", "expanded", "offset"])
        if layout == "BSHD":
            return values(batch, tokens, heads, head_dim).transpose(1, 2)
        if layout == "SBHD":
            return values(tokens, batch, heads, head_dim).permute(1, 2, 0, 3)
        if layout == "fused":
            whole = values(batch, tokens, 3, heads, head_dim)
            whole[:, :, ::2] = torch.nan
            return whole[:, :, 1].transpose(1, 2)
        if layout == "padded":
            whole = torch.full(
                (batch, heads, tokens + 3, head_dim + 16), torch.nan, device="cuda"
            ).to(self.dtype)
            inner = whole[:, :, 2:-1, 8:-8]
            inner.copy_(values(batch, heads, tokens, head_dim))
            return inner
        if layout == "expanded":
            return values(batch, 1, tokens, head_dim).expand(batch, heads, tokens, head_dim)
        if layout == "offset":
            flat = values(batch * heads * tokens * head_dim + 7)
            return flat[7:].view(batch, heads, tokens, head_dim)
        return values(batch, heads, tokens, head_dim)


def deviation(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; inf where not the same elements are NaN, inf or -inf."""
    for is_special in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(is_special(actual), is_special(expected)):
            return math.inf
    actual, expected = (x.double().nan_to_num(0, 0, 0) for x in (actual, expected))
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def plant(problem: RandomProblem, tensor: Tensor, *poison: float) -> None:
    """Writes some of what is not finite somewhere."""
    for _ in range(problem.plants):
        place = tuple(problem.rng.randrange(size) for size in tensor.shape)
        tensor[place] = problem.rng.choice(poison)


def check(problem: RandomProblem, provider: str) -> tuple[float, float] | None:
    """Errors of output and logsumexp, or None if the provider declines."""
    visible = oracle.mask(**problem.geometry, prefix=problem.prefix, suffix=problem.suffix).cuda()
    tokens = visible.shape[0]
    query = problem.tensor(problem.heads, tokens) * problem.size
    key, value = (problem.tensor(problem.kv_heads, tokens) for _ in range(2))
    # An infinite key can leave a visible value a weight of 0, and 0 times inf is NaN in the oracle.
    plant(problem, key, math.nan)
    plant(problem, value, math.nan, math.inf, -math.inf)
    key_mask, global_tokens = None, problem.prefix + problem.suffix
    if problem.masks_keys:
        shown = [problem.rng.random() < 0.5 for _ in range(problem.batch * global_tokens)]
        key_mask = torch.tensor(shown, dtype=torch.bool, device="cuda")
        key_mask = key_mask.view(problem.batch, global_tokens)
    try:
        output, logsumexp = ops.neighborhood_attention(
            query,
            key,
            value,
            **problem.geometry,
            prefix=problem.prefix,
            suffix=problem.suffix,
            key_mask=key_mask,
            scale=problem.scale,
            return_logsumexp=True,
            provider=provider,
        )
    except RuntimeError as error:
        if "dilation" in str(error):
            return None
        raise
    expected = oracle.attention(
        query,
        key,
        value,
        visible=visible,
        key_mask=key_mask,
        scale=problem.scale,
        prefix=problem.prefix,
    )
    finite = expected[1].isfinite()
    difference = (logsumexp.double() - expected[1])[finite].abs()
    lse_error = float(difference.nan_to_num(math.inf).amax()) if finite.any() else 0.0
    return deviation(output, expected[0]), lse_error


def assert_right(problem: RandomProblem, provider: str = "sm90") -> None:
    errors = check(problem, provider)
    if errors is None:
        return
    of_output, of_lse = TOLERANCE[problem.dtype]
    assert errors[0] < of_output, (errors, problem)
    assert errors[1] < of_lse, (errors, problem)


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
