"""How long the backend's own steps take beside Inductor's compilation.

Find, resolve, decide and rewrite on Wan's transformer with 20 blocks (20 self-attentions, 20
cross-attentions), narrow and short so that Inductor has as little to do as it can; caches off.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from diffusers import WanTransformer3DModel
from rich.console import Console
from rich.table import Table

from benchmarks.record import save
from gna_compile import backend
from gna_compile.lower import lower

BLOCKS = 20
GRID = (5, 6, 8)
POLICY: dict[str, Any] = {
    "version": 1,
    "min_tokens": 0,
    "min_speedup": 0,
    "rules": [{"layers": "blocks.*.attn1", "window": "1/2", "stride": 2}],
}


def main(
    rounds: Annotated[int, typer.Option(help="Compilations of each kind; the median counts.")] = 3,
) -> None:
    """Time of find + resolve + decide + rewrite over Inductor's compile time, 40 sites."""
    results = {
        name: [compile_once(dynamic) for _ in range(rounds)]
        for name, dynamic in (("static shapes", False), ("dynamic shapes", True))
    }
    table = Table("shapes", "sites", "ours, ms", "Inductor, s", "share", box=None)
    for name, runs in results.items():
        ours, inductor = (
            statistics.median(run[key] for run in runs) for key in ("ours", "inductor")
        )
        row = (f"{runs[0]['sites']:.0f}", f"{ours * 1e3:.0f}", f"{inductor:.1f}")
        table.add_row(name, *row, f"{ours / inductor:.2%}")
    Console().print(table)
    print(f"written to {save('overhead', results)}")


def compile_once(dynamic: bool) -> dict[str, float]:
    """Seconds of our own steps and of Inductor, of the compilation that Dynamo kept."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_layers=BLOCKS, num_attention_heads=2, attention_head_dim=24, ffn_dim=32, text_dim=32
    ).eval()
    frames, rows, columns = GRID
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 16, frames, 2 * rows, 2 * columns),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 32),
        "return_dict": False,
    }
    seconds: dict[str, float] = {}

    def timed(gm: Any, example_inputs: Any) -> Any:
        seconds["inductor"] = 0.0
        plan_of = backend.decide_graph

        def counted(*args: Any) -> Any:
            plan = plan_of(*args)
            seconds["sites"] = len(next(iter(plan.decisions.values())))
            return plan

        def timed_lower(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return lower(*args, **kwargs)
            finally:
                seconds["inductor"] += time.perf_counter() - start

        with (
            mock.patch.object(backend, "lower", timed_lower),
            mock.patch.object(backend, "decide_graph", counted),
        ):
            gc.collect()  # what Dynamo left: else a full collection falls into either part by chance
            start = time.perf_counter()
            run = backend.gna(gm, example_inputs, options={"policy": POLICY})
            seconds["ours"] = time.perf_counter() - start - seconds["inductor"]
        return run

    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(model, backend=timed, dynamic=dynamic)(**inputs)
    return seconds
