"""A training step of the op on this machine's GPU: forward and backward, beside dense attention's.

    python -m benchmarks backward                           # a few cases of `benchmarks kernels`
    python -m benchmarks backward flux4k-na --limit 60      # any of them

Whole op with autograd, bf16, batch 1. Candidates are dense attention by cuDNN and FlashAttention-2,
and providers of the op, by their names; they take turns. One that needs longer than `--limit` for a
step is left out, as the portable provider is on large cases.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import record, timing
from benchmarks.kernels import CASES, Case, dense

TYPICAL = ("1d-32k", "flux4k-gna", "flux4k-na", "cosmos-56-gna", "hunyuan-gna", "hunyuan-text")
CANDIDATES = "fa2,flex,cudnn,sm90"


@dataclass
class Result:
    """One case measured.

    Attributes:
        bound: dense attention's FLOPs over those of the visible pairs.
        ms: median milliseconds of forward and backward, by candidate.
        speedups: over cuDNN, the medians of the ratios turn by turn.
        failed: why a candidate did not take part.
    """

    case: str
    bound: float
    ms: dict[str, float]
    speedups: dict[str, float]
    failed: dict[str, str]


def main(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CASE]...", help="Which cases.")
    ] = None,
    candidates: Annotated[
        str, typer.Option(help="cudnn, fa2 (dense) and names of providers.")
    ] = CANDIDATES,
    repeats: Annotated[int, typer.Option(help="Turns of each.")] = 7,
    limit: Annotated[float, typer.Option(help="Seconds that a step may take.")] = 2.0,
) -> None:
    """Forward and backward of the op beside dense attention's."""
    for name in names or TYPICAL:
        if name not in CASES:
            raise typer.BadParameter(f"there is no case {name!r}, only {', '.join(CASES)}")
    if not torch.cuda.is_available():
        raise typer.BadParameter("this needs a CUDA device")
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 150)
    results: list[Result] = []
    for name in names or TYPICAL:
        steps = training_steps(CASES[name], candidates.split(","), "cuda")
        results.append(measure(name, steps, repeats, limit, "cuda"))
        console.print(f"{name}: {results[-1].ms} {results[-1].failed or ''}", highlight=False)
        rows = [asdict(result) for result in results]
        path = record.update(f"backward-{record.gpu()}", "case", rows, CASES)
    console.print(table(results))
    console.print(f"written to {path}")


def training_steps(
    case: Case, candidates: list[str], device: str
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Forward and backward of each, on the same inputs."""
    inputs = case.inputs(device, requires_grad=True)
    grad = torch.randn_like(inputs[0])

    def step(attend: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(), inputs, grad)

    return {
        name: partial(
            step,
            partial(dense, name, inputs)
            if name in ("cudnn", "fa2")
            else case.attention(inputs, name),
        )
        for name in candidates
    }


def measure(
    name: str,
    steps: dict[str, Callable[[], tuple[Tensor, ...]]],
    repeats: int,
    limit: float,
    device: str,
) -> Result:
    clock = timing.clock(device)
    grads, failed = timing.first_calls(steps)
    able = {name: step for name, step in steps.items() if name in grads}
    grads.clear()
    for candidate, step in list(able.items()):
        seconds = 1e-3 * clock(step, 0, 1)
        if seconds > limit:
            failed[candidate] = f"a step takes {seconds:.1f} s"
            del able[candidate]
    times = timing.take_turns(able, repeats, clock)
    ratios = timing.medians(timing.speedups(times, over="cudnn"))
    return Result(name, CASES[name].bound, timing.medians(times), ratios, failed)


def table(results: list[Result]) -> Table:
    names = list(dict.fromkeys(name for result in results for name in result.ms))
    gains = [name for name in names if name != "cudnn"]
    columns = ["case", *(f"{name} ms" for name in names), *gains, "bound"]
    text = Table(
        *columns, box=None, caption="Speedups are over cuDNN's dense forward and backward."
    )
    for result in results:
        ms = (f"{result.ms[name]:.2f}" if name in result.ms else "–" for name in names)
        ratios = (
            f"{result.speedups[name]:.2f}" if name in result.speedups else "–" for name in gains
        )
        text.add_row(result.case, *ms, *ratios, f"{result.bound:.2f}")
    return text


if __name__ == "__main__":
    typer.run(main)
