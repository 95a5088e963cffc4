"""Diffusion transformers at full width with random weights and few layers: `backend="gna"` with a
shipped policy against `backend="inductor"`, in one process and taking turns.

A step is one forward call. Its attention's share of GPU time, read off a profile of the dense step
in the same run, and the share of FLOPs that the policy keeps give the bound: no attention kernel
at dense attention's rate makes the step faster than 1 / (1 - share + share * kept).
"""

from __future__ import annotations

import copy
import os
import re
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch._inductor.utils import clear_caches

import gna_compile
from benchmarks import plots, record
from gna_compile.policy import DEFAULT_PHASE
from gna_compile.report.collect import collecting
from gna_compile.report.rows import Row

Grid = tuple[int, ...]
Inputs = dict[str, Any]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

TINY_POLICY: dict[str, Any] = {
    "version": 1,
    "min_tokens": 100,
    "min_speedup": 0,
    "key_mask": "global_tokens",
    "rules": [{"window": "1/2", "stride": 2}],
}


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        grid, tiny_grid: token grid, and the one of `--tiny`.
        text: text tokens.
        layers: blocks of its (first) kind.
        policy: the shipped policy for this grid.
        model: (layers, tiny) to the model.
        inputs: (grid, text tokens, batch, model) to the keyword arguments of `forward`.
    """

    grid: Grid
    tiny_grid: Grid
    text: int
    layers: int
    policy: str
    model: Callable[[int, bool], nn.Module]
    inputs: Callable[[Grid, int, int, Any], Inputs]


def flux(layers: int, tiny: bool) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    narrow: Inputs = {"num_attention_heads": 2, "joint_attention_dim": 32} if tiny else {}
    return FluxTransformer2DModel(
        num_layers=layers,
        num_single_layers=(1 if tiny else 2) * layers,
        guidance_embeds=True,
        **narrow,
    )


def flux_inputs(grid: Grid, text: int, batch: int, model: Any) -> Inputs:
    height, width = grid
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return {
        "hidden_states": torch.randn(batch, height * width, model.config.in_channels),
        "encoder_hidden_states": torch.randn(batch, text, model.config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, model.config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 4.0),  # a thousandfold exact in bf16, as is the time
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def hunyuan_video(layers: int, tiny: bool) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    narrow: Inputs = {"num_attention_heads": 2, "text_embed_dim": 32} if tiny else {}
    return HunyuanVideoTransformer3DModel(
        num_layers=layers, num_single_layers=(1 if tiny else 2) * layers, **narrow
    )


def hunyuan_video_inputs(grid: Grid, text: int, batch: int, model: Any) -> Inputs:
    mask = torch.ones(batch, text, dtype=torch.bool)
    mask[:, text // 2 :] = False  # half of the text is padding
    return {
        "hidden_states": latents(grid, batch, model),
        "timestep": torch.full((batch,), 500, dtype=torch.long),
        "encoder_hidden_states": torch.randn(batch, text, model.config.text_embed_dim),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, model.config.pooled_projection_dim),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


def wan(layers: int, tiny: bool) -> nn.Module:
    from diffusers import WanTransformer3DModel

    narrow: Inputs = {"num_attention_heads": 2, "text_dim": 32, "ffn_dim": 64} if tiny else {}
    return WanTransformer3DModel(num_layers=layers, **narrow)


def wan_inputs(grid: Grid, text: int, batch: int, model: Any) -> Inputs:
    return {
        "hidden_states": latents(grid, batch, model),
        "timestep": torch.full((batch,), 500, dtype=torch.long),
        "encoder_hidden_states": torch.randn(batch, text, model.config.text_dim),
        "return_dict": False,
    }


def cosmos(layers: int, tiny: bool) -> nn.Module:
    from diffusers import CosmosTransformer3DModel

    narrow: Inputs = {"num_attention_heads": 2, "text_embed_dim": 32} if tiny else {}
    # The padding mask is resized with torchvision, which nothing else here needs.
    return CosmosTransformer3DModel(num_layers=layers, concat_padding_mask=False, **narrow)


def cosmos_inputs(grid: Grid, text: int, batch: int, model: Any) -> Inputs:
    return {
        "hidden_states": latents(grid, batch, model),
        "timestep": torch.full((batch,), 500, dtype=torch.long),
        "encoder_hidden_states": torch.randn(batch, text, model.config.text_embed_dim),
        "fps": 24,
        "return_dict": False,
    }


def latents(grid: Grid, batch: int, model: Any) -> Tensor:
    """Video latents of models whose patches are 1x2x2."""
    frames, height, width = grid
    return torch.randn(batch, model.config.in_channels, frames, 2 * height, 2 * width)


# fmt: off
CASES = {
    "flux": Case((256, 256), (12, 16), 512, 2, "flux-4k", flux, flux_inputs),
    "hunyuan-video": Case(
        (30, 48, 80), (4, 6, 8), 256, 2, "hunyuan-video-720p", hunyuan_video, hunyuan_video_inputs,
    ),
    "wan": Case((21, 45, 80), (4, 6, 8), 512, 3, "wan2.1-720p", wan, wan_inputs),
    "cosmos": Case(
        (16, 44, 80), (4, 6, 8), 512, 3, "cosmos-7b-720p-89", cosmos, cosmos_inputs
    ),
}
# fmt: on


@dataclass
class Side:
    """One backend on one model.

    Attributes:
        cold_s, warm_s: the first call with empty caches, and with the caches that it left.
        ms: median of the steps.
        peak_gib: peak memory of a step, with weights and inputs.
        profile_ms: device time of one step by kind.
        attention_share: attention's share of it.
        kernels: the longest kernels, name to [milliseconds, calls].
    """

    cold_s: float = 0.0
    warm_s: float = 0.0
    ms: float = 0.0
    peak_gib: float | None = None
    profile_ms: dict[str, float] = field(default_factory=dict)
    attention_share: float = 0.0
    kernels: dict[str, tuple[float, int]] = field(default_factory=dict)


@dataclass
class Result:
    """One model measured; the sites are those of the policy's default phase."""

    model: str
    grid: Grid
    text: int
    layers: int
    batch: int
    dtype: str
    policy: str
    regional: bool
    mode: str | None
    dense: Side
    gna: Side
    rewritten: int
    dense_sites: dict[str, int]
    flops_kept: float
    predicted: float | None
    speedup: float
    ratios: list[float]
    bound: float
    of_bound: float
    finite: bool
    max_difference: float


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Which models; all if none.")] = None,
    layers: Annotated[int, typer.Option(help="Blocks (of the first kind); 0 for 2 or 3.")] = 0,
    repeats: Annotated[int, typer.Option(help="Pairs of steps.")] = 5,
    batch: Annotated[int, typer.Option(help="Samples in a batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    regional: Annotated[
        bool, typer.Option(help="Regional compilation (block by block), prepared.")
    ] = False,
    mode: Annotated[str | None, typer.Option(help="Inductor's mode, of both.")] = None,
    tiny: Annotated[bool, typer.Option(help="Narrow models, small grids, on the CPU.")] = False,
) -> None:
    """Whole transformers: step, compile time, memory and attention's share, dense and gna."""
    console = Console()
    device = "cpu" if tiny else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU: --tiny runs on the CPU")
    variant = "".join(
        f"-{part}"
        for part, is_told in (
            ("regional", regional),
            (mode, mode is not None),
            (f"batch{batch}", batch != 1),
            (dtype, dtype != "bf16"),
        )
        if is_told
    )
    results: list[Result] = []
    for name in models or CASES:
        if name not in CASES:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(CASES)}")
        results.append(measure(name, layers, repeats, batch, dtype, regional, mode, tiny, device))
        console.print(summary(results[-1]), highlight=False)
        if not tiny:
            # After every model, so that a run that is cut off leaves what it has.
            file = f"models-{record.gpu()}{variant}"
            path = record.update(file, "model", [asdict(result) for result in results], CASES)
    if not tiny:
        console.print(f"written to {path}")
        plots.draw(path)


def measure(
    name: str,
    layers: int,
    repeats: int,
    batch: int,
    dtype: str,
    regional: bool,
    mode: str | None,
    tiny: bool,
    device: str,
) -> Result:
    case = CASES[name]
    layers = layers or (1 if tiny else case.layers)
    grid, text = (case.tiny_grid, 14) if tiny else (case.grid, case.text)
    policy: Any = TINY_POLICY if tiny else case.policy
    model, inputs = build(case, grid, text, layers, batch, DTYPES[dtype], tiny, device)
    # Each backend has modules of its own, with the same weights.
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    if regional:
        # A block alone does not show the grid; FLUX's is read off its position ids.
        gna_compile.prepare(twin, policy, layout=None if name == "flux" else {"grid": grid})

    def start(backend: str) -> Callable[[], Tensor]:
        """Compiled anew, lazily."""
        module = twin if backend == "gna" else model
        options = None
        if backend == "gna":
            options = ({} if regional else {"policy": policy}) | ({"mode": mode} if mode else {})
        kwargs = {"options": options} if options else {"mode": mode}
        compiled: Any = module
        if regional:
            compile_blocks(module, backend=backend, **kwargs)
        else:
            compiled = torch.compile(module, backend=backend, **kwargs)

        def run() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                return compiled(**inputs)[0]

        return run

    warm_up(device)
    sides = {"inductor": Side(), "gna": Side()}
    runs: dict[str, Callable[[], Tensor]] = {}
    outputs: dict[str, Tensor] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for backend, side in sides.items():
            torch._dynamo.reset()
            with caches(Path(folder, backend)), collecting() as records:
                outputs[backend], side.cold_s = timed(start(backend), device)
            rows += [row for graph in records for row in graph.rows if row.phase == DEFAULT_PHASE]
            outputs[backend] = outputs[backend].clone()
        torch._dynamo.reset()
        for backend, side in sides.items():
            with caches(Path(folder, backend)):
                runs[backend] = start(backend)
                side.warm_s = timed(runs[backend], device)[1]
                for _ in range(2):  # CUDA graphs are recorded by the second call
                    runs[backend]()
        ratios = take_turns(runs, sides, repeats, device)
        for backend, side in sides.items():
            side.peak_gib = peak_memory(runs[backend], device)
            side.kernels = profile(runs[backend], device)
    for side in sides.values():
        side.profile_ms = by_kind(side.kernels)
        side.attention_share = side.profile_ms["attention"] / sum(side.profile_ms.values())
        side.kernels = dict(sorted(side.kernels.items(), key=lambda k: -k[1][0])[:20])

    rewritten = [row for row in rows if row.decision == "gna"]
    work = [row.heads * row.tokens**2 * row.head_dim for row in rewritten]
    kept = sum(w * (row.flop_share or 1) for w, row in zip(work, rewritten, strict=True))
    flops_kept = kept / sum(work) if rewritten else 1.0
    share, speedup = sides["inductor"].attention_share, statistics.median(ratios)
    bound = 1 / (1 - share + share * flops_kept)
    difference = (outputs["inductor"].float() - outputs["gna"].float()).abs().max().item()
    predicted = [row.predicted_speedup for row in rewritten if row.predicted_speedup]
    return Result(
        model=name,
        grid=grid,
        text=text,
        layers=layers,
        batch=batch,
        dtype=dtype,
        policy="tiny" if tiny else case.policy,
        regional=regional,
        mode=mode,
        dense=sides["inductor"],
        gna=sides["gna"],
        rewritten=len(rewritten),
        dense_sites=dict(Counter(row.reason for row in rows if row.reason)),
        flops_kept=flops_kept,
        predicted=statistics.mean(predicted) if predicted else None,
        speedup=speedup,
        ratios=ratios,
        bound=bound,
        of_bound=speedup / bound,
        finite=all(bool(output.isfinite().all()) for output in outputs.values()),
        max_difference=difference,
    )


def build(
    case: Case,
    grid: Grid,
    text: int,
    layers: int,
    batch: int,
    dtype: torch.dtype,
    tiny: bool,
    device: str,
) -> tuple[nn.Module, Inputs]:
    """The model as `from_pretrained(torch_dtype=dtype)` makes it, but with random weights."""
    torch.manual_seed(0)
    with creating(dtype, device):
        model = case.model(layers, tiny).eval()
        inputs = case.inputs(grid, text, batch, model)
    in_fp32 = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if in_fp32 & set(name.split(".")):
            parameter.data = parameter.data.float()
    return model.requires_grad_(False), inputs


@contextmanager
def creating(dtype: torch.dtype, device: str) -> Iterator[None]:
    """New tensors are of this type, on this device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)


def compile_blocks(model: Any, **kwargs: Any) -> None:
    """`compile_repeated_blocks`, also for Cosmos, which does not name its blocks."""
    names = getattr(model, "_repeated_blocks", None) or ["CosmosTransformerBlock"]
    for module in model.modules():
        if type(module).__name__ in names:
            module.compile(**kwargs)


def warm_up(device: str) -> None:
    """Whatever a process does once is not part of a model's compile time."""
    with tempfile.TemporaryDirectory() as folder, caches(Path(folder)):
        torch.compile(lambda x: x.sin() + 1)(torch.ones(32, device=device))
        x = torch.randn(1, 1, 1024, 128, device=device, dtype=torch.bfloat16)
        gna_compile.neighborhood_attention(x, x, x, grid=(1024,), window=(128,))


@contextmanager
def caches(folder: Path) -> Iterator[None]:
    """Inductor and Triton keep their caches there; nothing is remembered in memory."""
    clear_caches()
    places = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    with mock.patch.dict(os.environ, places):
        yield
    clear_caches()


def timed(run: Callable[[], Tensor], device: str) -> tuple[Tensor, float]:
    """The result and the seconds by the clock on the wall."""
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def take_turns(
    runs: dict[str, Callable[[], Tensor]], sides: dict[str, Side], repeats: int, device: str
) -> list[float]:
    """Ratios of neighboring steps, dense over gna; fills in the medians of the steps."""
    times: dict[str, list[float]] = defaultdict(list)
    for turn in range(repeats):
        for backend in list(runs)[:: 1 if turn % 2 else -1]:
            times[backend].append(step_ms(runs[backend], device))
    for backend, side in sides.items():
        side.ms = statistics.median(times[backend])
    return [dense / gna for dense, gna in zip(times["inductor"], times["gna"], strict=True)]


def step_ms(run: Callable[[], Tensor], device: str) -> float:
    if device == "cpu":
        return 1e3 * timed(run, device)[1]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_memory(run: Callable[[], Tensor], device: str) -> float | None:
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def profile(run: Callable[[], Tensor], device: str) -> dict[str, tuple[float, int]]:
    """Milliseconds and calls of each kernel of a step; on a CPU of each operator, by itself."""
    activities = torch.profiler.ProfilerActivity
    activity = activities.CUDA if device == "cuda" else activities.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    kernels: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        if event.device_type.name == device.upper() and not event.is_user_annotation:
            on_cuda, on_cpu = event.self_device_time_total, event.self_cpu_time_total
            kernels[event.key] = (1e-3 * (on_cuda if device == "cuda" else on_cpu), event.count)
    return kernels


# Inductor names a Triton kernel after all operators that it came from, attention's own included.
COPIES = {"clone", "cat", "copy", "to", "view", "transpose", "permute", "slice", "unsqueeze"}
COPIES |= {"expand", "squeeze", "reshape", "select", "stack", "constant", "pad", "nd", "split"}
ATTENTION = re.compile(r"flash|fmha|sdpa|attention|gna::")
MATMUL = re.compile(r"gemm|nvjet|cublas|cutlass|xmma|splitk|triton_tem|mm$|linear|conv")


def kind_of(kernel: str) -> str:
    """attention, matmul, copies, pointwise (Inductor's other kernels), or other."""
    name = kernel.lower()
    if name.startswith("triton_") and not name.startswith("triton_tem"):
        operators = name.partition("_fused_")[2].rstrip("0123456789").strip("_").split("_")
        return "copies" if set(filter(None, operators)) <= COPIES else "pointwise"
    if ATTENTION.search(name):
        return "attention"
    if MATMUL.search(name):
        return "matmul"
    if "memcpy" in name or "copy_kernel" in name or "catarray" in name:
        return "copies"
    return "other"


def by_kind(kernels: dict[str, tuple[float, int]]) -> dict[str, float]:
    total = dict.fromkeys(("attention", "matmul", "copies", "pointwise", "other"), 0.0)
    for name, (milliseconds, _) in kernels.items():
        total[kind_of(name)] += milliseconds
    return total


def summary(result: Result) -> str:
    dense_sites = ", ".join(f"{reason} {n}" for reason, n in result.dense_sites.items()) or "none"
    lines = [
        f"{result.model}, {'x'.join(map(str, result.grid))} + {result.text}, {result.layers} "
        f"layers, {result.dtype}, batch {result.batch}: {result.dense.ms:.1f} -> "
        f"{result.gna.ms:.1f} ms, {result.speedup:.2f}x of at most {result.bound:.2f}x "
        f"({result.of_bound:.0%})",
        f"  sites rewritten: {result.rewritten}, dense: {dense_sites}; FLOPs kept "
        f"{result.flops_kept:.1%}; finite: {result.finite}, "
        f"max |difference| {result.max_difference:.3g}",
    ]
    for name, side in (("dense", result.dense), ("gna", result.gna)):
        parts = ", ".join(f"{kind} {ms:.1f}" for kind, ms in side.profile_ms.items())
        memory = "" if side.peak_gib is None else f"; peak {side.peak_gib:.1f} GiB"
        lines.append(
            f"  {name}: compile {side.cold_s:.1f} s cold, {side.warm_s:.1f} s warm{memory}; "
            f"ms by kind: {parts} (attention {side.attention_share:.0%})"
        )
    return "\n".join(lines)
