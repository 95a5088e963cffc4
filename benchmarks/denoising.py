"""A denoising loop whose first steps are dense, as the paper's recipe for FLUX has them.

diffusers' `FluxPipeline` with a transformer of random weights and few layers, 4096x4096, given
prompt embeddings and latents out, so that nothing but the transformer takes time.
"""

from __future__ import annotations

import copy
import itertools
import time
from typing import Annotated, Any

import torch
import typer
from torch._dynamo.utils import counters

import gna_compile
from benchmarks import record
from benchmarks.models import CASES, TINY_POLICY, build
from gna_compile.policy import DEFAULT_PHASE
from gna_compile.report.collect import collecting, summary

TINY: dict[str, Any] = {
    **TINY_POLICY,
    "phases": {"warmup": {"first": 9, "of": 28}},
    "rules": [{"phases": "warmup", "dense": True}, *TINY_POLICY["rules"]],
}


def main(
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 28,
    layers: Annotated[int, typer.Option(help="Double blocks; twice as many single ones.")] = 2,
    tiny: Annotated[bool, typer.Option(help="A narrow model, a small image, on the CPU.")] = False,
) -> None:
    """28 steps of FLUX, the first 9 dense: time beside dense, and when Dynamo compiles."""
    device = "cpu" if tiny else "cuda"
    policy: Any = TINY if tiny else CASES["flux"].policy
    case, grid = CASES["flux"], (12, 16) if tiny else CASES["flux"].grid
    dtype = torch.float32 if tiny else torch.bfloat16
    model, inputs = build(case, grid, case.text, layers, 1, dtype, tiny, device)
    twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    model.compile(backend="inductor")
    twin.compile(backend="gna", options={"policy": policy})
    dense = denoise(model, inputs, grid, steps, None)
    with gna_compile.phase(DEFAULT_PHASE):
        gna = denoise(twin, inputs, grid, steps, policy)
    results = {"dense": dense, "gna": gna, "speedup": dense["seconds"] / gna["seconds"]}
    print(f"{steps} steps: dense {dense['seconds']:.2f} s, gna {gna['seconds']:.2f} s")
    print(f"speedup {results['speedup']:.2f}x")
    for phase, milliseconds in gna["ms"].items():
        print(f"a step in phase {phase}: {milliseconds:.1f} ms")
    print(gna["sites"])
    print(f"graphs compiled in the first run's steps: {gna['compiled']}")
    print(f"graphs compiled in the second run: {gna['compiled again']}")
    if not tiny:
        gpu = torch.cuda.get_device_name().split()[1].lower()
        record.save(f"denoising-{gpu}", {"steps": steps, "layers": layers, **results})


def denoise(
    model: Any, inputs: dict[str, Any], grid: tuple[int, ...], steps: int, policy: Any
) -> dict[str, Any]:
    """Two runs of the pipeline: the first compiles, the second is timed."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **parts)
    pipe.set_progress_bar_config(disable=True)
    schedule = gna_compile.PhaseSchedule(policy, steps) if policy is not None else None
    compiled: dict[int, int] = {}
    ends: list[tuple[str, float]] = []
    before = graphs()

    def step_end(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        nonlocal before
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        ends.append((gna_compile.current_phase(), time.perf_counter()))
        if graphs() > before:
            compiled[step], before = graphs() - before, graphs()
        return schedule(pipe, step, timestep, kwargs) if schedule else kwargs

    def run() -> torch.Tensor:
        ends[:] = [("start", time.perf_counter())]
        return pipe(
            prompt_embeds=inputs["encoder_hidden_states"],
            pooled_prompt_embeds=inputs["pooled_projections"],
            height=16 * grid[0],
            width=16 * grid[1],
            num_inference_steps=steps,
            output_type="latent",
            callback_on_step_end=step_end,
            generator=torch.Generator().manual_seed(0),
            return_dict=False,
        )[0]

    with collecting() as records:
        run()
    first = dict(compiled)
    compiled.clear()
    latents = run()
    times: dict[str, list[float]] = {}
    for (_, start), (phase, end) in itertools.pairwise(ends):
        times.setdefault(phase, []).append(1e3 * (end - start))
    return {
        "seconds": ends[-1][1] - ends[0][1],
        "ms": {phase: sum(values) / len(values) for phase, values in times.items()},
        "sites": summary([row for record in records for row in record.rows]) if policy else "",
        "compiled": first,
        "compiled again": compiled,
        "finite": bool(latents.isfinite().all()),
    }


def graphs() -> int:
    return counters["stats"]["unique_graphs"]
