"""Denoising loops whose first steps are dense, as the paper's recipes have them.

diffusers' pipelines around transformers of random weights and few layers, with prompt embeddings
given and latents out, so that nothing but the transformer takes time; one call of it a step.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn
from torch._dynamo.utils import counters

import gna_compile
from benchmarks import record
from benchmarks.models import CASES, TINY_POLICY, Inputs, build
from gna_compile.policy import DEFAULT_PHASE
from gna_compile.report.collect import collecting, summary

WARM_UP_STEPS = 4  # of the run before the timed one: both phases, and what they compile

TINY: dict[str, Any] = {
    **TINY_POLICY,
    "phases": {"warmup": {"first": 9, "of": 28}},
    "rules": [{"phases": "warmup", "dense": True}, *TINY_POLICY["rules"]],
}


@dataclass(frozen=True)
class Recipe:
    """How the paper (arXiv 2504.16922) runs a model.

    Attributes:
        steps: of the denoising loop.
        policy: the shipped policy, which says how many of them are dense.
        paper: speedup of a whole run that the paper measured on a B200 with these dense steps.
        size: (grid) to the pipeline's height, width and number of frames.
        prompt: (inputs of the transformer) to the pipeline's arguments that stand for a prompt.
        pipeline: (transformer) to the pipeline.
    """

    steps: int
    policy: str
    paper: float
    size: Callable[[tuple[int, ...]], Inputs]
    prompt: Callable[[Inputs], Inputs]
    pipeline: Callable[[Any], Any]


def flux(transformer: nn.Module) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    absent = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(scheduler=scheduler, transformer=transformer, **absent)


def hunyuan_video(transformer: nn.Module) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    absent = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return HunyuanVideoPipeline(scheduler=scheduler, transformer=transformer, **absent)


class NothingToCheck:
    """Stands where the pipeline has a checker of prompts and videos: here there are none of either."""

    def to(self, device: Any) -> None:
        pass


def cosmos(transformer: nn.Module) -> Any:
    from diffusers import CosmosTextToWorldPipeline, EDMEulerScheduler

    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return CosmosTextToWorldPipeline(
        scheduler=EDMEulerScheduler(sigma_max=80.0, final_sigmas_type="sigma_min"),
        transformer=transformer,
        safety_checker=NothingToCheck(),
        **absent,
    )


def video_size(frames_per_latent: int) -> Callable[[tuple[int, ...]], Inputs]:
    """Of a model whose tokens are 16x16 pixels and as many frames as a latent has."""

    def size(grid: tuple[int, ...]) -> Inputs:
        frames, height, width = grid
        return {
            "num_frames": frames_per_latent * (frames - 1) + 1,
            "height": 16 * height,
            "width": 16 * width,
        }

    return size


RECIPES = {
    "flux": Recipe(
        28,
        "flux-4k",
        1.45,
        lambda grid: {"height": 16 * grid[0], "width": 16 * grid[1]},
        lambda inputs: {
            "prompt_embeds": inputs["encoder_hidden_states"],
            "pooled_prompt_embeds": inputs["pooled_projections"],
        },
        flux,
    ),
    "hunyuan-video": Recipe(
        50,
        "hunyuan-video-720p",
        1.63,
        video_size(4),
        lambda inputs: {
            "prompt_embeds": inputs["encoder_hidden_states"],
            "pooled_prompt_embeds": inputs["pooled_projections"],
            "prompt_attention_mask": inputs["encoder_attention_mask"],
        },
        hunyuan_video,
    ),
    # Guidance would call the transformer a second time, with a negative prompt.
    "cosmos": Recipe(
        35,
        "cosmos-7b-720p",
        1.26,
        video_size(8),
        lambda inputs: {"prompt_embeds": inputs["encoder_hidden_states"], "guidance_scale": 1.0},
        cosmos,
    ),
}


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Which models; all if none.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps; 0 for the recipe's.")] = 0,
    layers: Annotated[int, typer.Option(help="Blocks (of the first kind); 0 for 2 or 3.")] = 0,
    tiny: Annotated[bool, typer.Option(help="Narrow models, small grids, on the CPU.")] = False,
) -> None:
    """Whole denoising loops, the first steps dense: time beside dense, and when Dynamo compiles."""
    if not tiny and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU: --tiny runs on the CPU")
    console = Console(soft_wrap=True)
    results: list[dict[str, Any]] = []
    for name in models or RECIPES:
        if name not in RECIPES:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(RECIPES)}")
        results.append(measure(name, steps or RECIPES[name].steps, layers, tiny))
        console.print(text(results[-1]), highlight=False)
        if not tiny:
            record.update(f"denoising-{record.gpu()}", "model", results, RECIPES)


def measure(name: str, steps: int, layers: int, tiny: bool) -> dict[str, Any]:
    recipe = RECIPES[name]
    policy: Any = TINY if tiny else recipe.policy
    layers = layers or (1 if tiny else CASES[name].layers)
    model, arguments = prepared(name, layers, tiny)
    twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    model.compile(backend="inductor")
    twin.compile(backend="gna", options={"policy": policy})
    dense = denoise(recipe.pipeline(model), arguments, steps, None)
    gna = denoise(recipe.pipeline(twin), arguments, steps, policy)
    return {
        "model": name,
        "size": recipe.size(CASES[name].tiny_grid if tiny else CASES[name].grid),
        "layers": layers,
        "policy": "tiny" if tiny else policy,
        "steps": steps,
        "dense": dense,
        "gna": gna,
        "speedup": dense["seconds"] / gna["seconds"],
        "paper": recipe.paper,
    }


def prepared(name: str, layers: int, tiny: bool) -> tuple[nn.Module, Inputs]:
    """The transformer, and the arguments of its pipeline that say what to make."""
    case, recipe = CASES[name], RECIPES[name]
    grid, words = (case.tiny_grid, 14) if tiny else (case.grid, case.text)
    dtype, device = (torch.float32, "cpu") if tiny else (torch.bfloat16, "cuda")
    model, inputs = build(case, grid, words, layers, 1, dtype, tiny, device)
    return model, {**recipe.size(grid), **recipe.prompt(inputs)}


def denoise(pipe: Any, arguments: Inputs, steps: int, policy: Any) -> dict[str, Any]:
    """Two runs of the pipeline: a short one compiles, the second is timed."""
    pipe.set_progress_bar_config(disable=True)
    compiled: dict[int, int] = {}
    ends: list[tuple[str, float]] = []
    before = graphs()

    def run(steps: int) -> torch.Tensor:
        schedule = gna_compile.PhaseSchedule(policy, steps) if policy is not None else None

        def step_end(pipe: Any, step: int, timestep: Any, kwargs: Inputs) -> Inputs:
            nonlocal before
            if pipe.device.type == "cuda":
                torch.cuda.synchronize()
            ends.append((gna_compile.current_phase(), time.perf_counter()))
            if graphs() > before:
                compiled[step], before = graphs() - before, graphs()
            return schedule(pipe, step, timestep, kwargs) if schedule else kwargs

        compiled.clear()
        ends[:] = [("start", time.perf_counter())]
        latents: torch.Tensor = pipe(
            **arguments,
            num_inference_steps=steps,
            output_type="latent",
            callback_on_step_end=step_end,
            generator=torch.Generator().manual_seed(0),
            return_dict=False,
        )[0]
        return latents

    with gna_compile.phase(DEFAULT_PHASE), collecting() as records:
        run(WARM_UP_STEPS)
        first = dict(compiled)
        latents = run(steps)
    times: dict[str, list[float]] = {}
    for (_, start), (phase, end) in itertools.pairwise(ends):
        times.setdefault(phase, []).append(1e3 * (end - start))
    return {
        "seconds": ends[-1][1] - ends[0][1],
        "ms": {phase: sum(values) / len(values) for phase, values in times.items()},
        "steps": {phase: len(values) for phase, values in times.items()},
        "sites": summary([row for record in records for row in record.rows]) if policy else "",
        "compiled": first,
        "compiled again": dict(compiled),
        "finite": bool(latents.isfinite().all()),
    }


def text(result: dict[str, Any]) -> str:
    dense, gna = result["dense"], result["gna"]
    lines = [
        f"{result['model']}, {'x'.join(map(str, result['size'].values()))}, "
        f"{result['layers']} layers, "
        f"{result['policy']}, {result['steps']} steps: dense {dense['seconds']:.2f} s, "
        f"gna {gna['seconds']:.2f} s, {result['speedup']:.2f}x "
        f"(the paper's whole run on a B200: {result['paper']:.2f}x)"
    ]
    for phase, milliseconds in gna["ms"].items():
        lines.append(f"  {gna['steps'][phase]} steps in phase {phase}: {milliseconds:.1f} ms each")
    lines += [
        f"  {gna['sites']}",
        f"  graphs compiled in the steps of the first run: {gna['compiled']}, of the timed one: "
        f"{gna['compiled again']}; finite: {dense['finite'] and gna['finite']}",
    ]
    return "\n".join(lines)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]
