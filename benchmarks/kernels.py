"""The op's kernel on this machine's GPU beside its peers, in one run and taking turns.

    python -m benchmarks kernels                    # all cases
    python -m benchmarks kernels hunyuan-na ltx-11  # some of them
    python -m benchmarks kernels --peers cudnn      # without the slow peers

Whole op, forward, bf16, batch 1. Dense attention by cuDNN (`cudnn`) and FlashAttention-2 (`fa2`)
computes every pair; `flex` is the same neighborhood attention by FlexAttention's kernels with tokens
in tile order, its copies there and back included. `cudnn-masked` is what Inductor runs for a model
that masks its padded text. The speedup over cuDNN is the median of the ratios turn by turn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import plots, record, timing
from gna_compile.geometry import Neighborhood
from gna_compile.ops import neighborhood_attention
from gna_compile.planner import ARCHITECTURES, Workload, plan, speedups
from gna_compile.simulate import cases

PEERS = ("fa2", "flex", "cudnn")
OURS = "ours"
NEAR_ENOUGH = 0.98  # of its goal: a case that reaches this meets it
_DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Case:
    """A problem of `gna simulate`, and how much faster than cuDNN we mean to be.

    Args:
        problem: geometry, heads and head_dim.
        goal: speedup over cuDNN's dense attention; None where it is a share of the FLOP bound.
        share: goal as a share of the FLOP bound.
        shown: of the global tokens, how many the key mask leaves visible; None for no mask.
    """

    problem: cases.Case
    goal: float | None = None
    share: float = 1.0
    shown: int | None = None

    @property
    def neighborhood(self) -> Neighborhood:
        return self.problem.workload.neighborhood

    @property
    def pairs(self) -> int:
        """Visible pairs of one head; what the key mask hides is not."""
        neighborhood = self.neighborhood
        hidden = 0 if self.shown is None else neighborhood.global_tokens - self.shown
        return neighborhood.pairs - hidden * neighborhood.tokens

    @property
    def flops(self) -> int:
        return 4 * self.pairs * self.problem.heads * self.problem.head_dim

    @property
    def bound(self) -> float:
        """Dense attention's FLOPs over those of the visible pairs."""
        return self.neighborhood.tokens**2 / self.pairs

    @property
    def target(self) -> float:
        return self.share * self.bound if self.goal is None else self.goal

    def inputs(self, device: str, **kwargs: Any) -> list[Tensor]:
        """Query, key and value."""
        problem = self.problem
        shape = (1, problem.heads, self.neighborhood.tokens, problem.head_dim)
        return [torch.randn(shape, device=device, dtype=torch.bfloat16, **kwargs) for _ in range(3)]

    def attention(self, inputs: list[Tensor], provider: str) -> Callable[[], Tensor]:
        """The op on these inputs."""
        problem, key_mask = self.problem, None
        if self.shown is not None:
            places = torch.arange(self.neighborhood.global_tokens, device=inputs[0].device)
            key_mask = places[None] < self.shown

        def attend() -> Tensor:
            output = neighborhood_attention(
                *inputs,
                grid=problem.grid,
                window=problem.window,
                stride=problem.stride,
                dilation=problem.dilation,
                prefix=problem.prefix,
                suffix=problem.suffix,
                key_mask=key_mask,
                provider=provider,
            )
            assert isinstance(output, Tensor)
            return output

        return attend


_GOALS: dict[str, dict[str, Any]] = {
    "hunyuan-gna": {"goal": 11.1},
    "hunyuan-na": {"goal": 6.0},
    "hunyuan-58": {"goal": 2.4},
    "flux4k-gna": {"goal": 10.2},
    "flux4k-na": {"goal": 7.4},
    "cosmos-56-gna": {"goal": 2.29},
    "cosmos-89-gna": {"goal": 9.1},
    "cosmos-89-na": {"goal": 6.8},
    "wan720p-gna": {"goal": 9.3},
    "wan720p-na": {"goal": 5.2},
    "1d-32k": {"goal": 15.0},
    "1d-32k-na": {"goal": 13.5},
    "ltx-11": {"goal": 40.0},
    "ltx-355": {"goal": 150.0},
    "dense": {"goal": 1.0},
    "dense-64": {"goal": 1.0},
    "flux4k-text": {"share": 0.97},
    "hunyuan-text": {"share": 0.97, "shown": 100},
    "dilated": {"share": 0.5},
}
CASES = {name: Case(cases.CASES[name], **goal) for name, goal in _GOALS.items()}


@dataclass
class Result:
    """One case measured.

    Attributes:
        ms: median milliseconds of each candidate, `OURS` among them.
        failed: why a candidate did not run.
        speedups: of each over cuDNN, the medians of the ratios turn by turn.
        ratios: those of `OURS`.
        goal: the speedup that `OURS` is meant to reach.
        of_goal: the share of it that was reached; None without cuDNN.
        bound: dense attention's FLOPs over those of the visible pairs.
        flops: of the visible pairs.
        tflops: useful TFLOP/s of each: those FLOPs over its time, whatever else it computed.
        predicted_ms: by the planner for `OURS`.
        prediction_error: predicted over measured time, less 1.
        predicted_speedup: over dense attention, by the planner.
        difference: largest absolute difference between the outputs of `OURS` and `flex`.
    """

    case: str
    goal: float
    bound: float
    flops: int
    ms: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    speedups: dict[str, float] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    of_goal: float | None = None
    tflops: dict[str, float] = field(default_factory=dict)
    predicted_ms: float | None = None
    prediction_error: float | None = None
    predicted_speedup: float | None = None
    difference: float | None = None


def main(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CASE]...", help="Which cases; all if none.")
    ] = None,
    peers: Annotated[str, typer.Option(help="Baselines beside ours.")] = ",".join(PEERS),
    repeats: Annotated[int, typer.Option(help="Turns of each.")] = 7,
    provider: Annotated[
        str, typer.Option(help="Which kernel is ours; this GPU's native one if none.")
    ] = "",
) -> None:
    """The kernel against cuDNN, FlashAttention-2 and FlexAttention, and its predicted time."""
    chosen = [peer for peer in peers.split(",") if peer]
    for kind, given, known in (("case", names or [], CASES), ("peer", chosen, PEERS)):
        for name in given:
            if name not in known:
                raise typer.BadParameter(f"there is no {kind} {name!r}, only {', '.join(known)}")
    if not torch.cuda.is_available():
        raise typer.BadParameter("this needs a CUDA device")
    provider = provider or ("sm100" if torch.cuda.get_device_capability()[0] == 10 else "sm90")
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(record.environment(), highlight=False)
    results: list[Result] = []
    for name in names or CASES:
        results.append(measure(name, CASES[name], chosen, repeats, provider, "cuda"))
        console.print(summary(results[-1]), highlight=False)
        # After every case, so that a run that is cut off leaves what it has.
        rows = [asdict(result) for result in results]
        path = record.update(f"kernels-{record.gpu()}", "case", rows, CASES)
    console.print(table(results))
    console.print(f"written to {path}")
    plots.draw(path)


def measure(
    name: str, case: Case, peers: list[str], repeats: int, provider: str, device: str
) -> Result:
    """Times one case. A candidate that fails is left out, with the reason."""
    result = Result(name, case.target, case.bound, case.flops)
    runs = candidates(case, peers, provider, device)
    outputs, result.failed = timing.first_calls(runs)
    if OURS in outputs and "flex" in outputs:
        result.difference = (outputs[OURS] - outputs["flex"]).abs().max().item()
    able = {name: run for name, run in runs.items() if name in outputs}
    outputs.clear()
    times = timing.take_turns(able, repeats, timing.clock(device))
    result.ms = timing.medians(times)
    result.tflops = {peer: 1e-9 * case.flops / ms for peer, ms in result.ms.items()}
    ratios = timing.speedups(times, over="cudnn")
    result.speedups = timing.medians(ratios)
    result.ratios = ratios.get(OURS, [])
    if OURS in result.speedups:
        result.of_goal = result.speedups[OURS] / case.target
    if provider in ARCHITECTURES:
        predict(result, case, provider)
    return result


def candidates(
    case: Case, peers: list[str], provider: str, device: str
) -> dict[str, Callable[[], Tensor]]:
    """What takes turns; cuDNN and ours, which are compared, come last."""
    inputs = case.inputs(device)
    runs: dict[str, Callable[[], Tensor]] = {}
    if "fa2" in peers:
        runs["fa2"] = partial(dense, "fa2", inputs)
    if "flex" in peers:
        runs["flex"] = case.attention(inputs, "flex")
    if "cudnn" in peers:
        if case.shown is not None:
            neighborhood = case.neighborhood
            places = torch.arange(neighborhood.tokens, device=device)
            # Suffix tokens only: the cases with a key mask have no prefix.
            shown = places < neighborhood.tokens - neighborhood.suffix + case.shown
            runs["cudnn-masked"] = partial(dense, "cudnn", inputs, shown[None, None, None])
        runs["cudnn"] = partial(dense, "cudnn", inputs)
    runs[OURS] = case.attention(inputs, provider)
    return runs


def dense(peer: str, inputs: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """Dense attention by one of PyTorch's backends."""
    query, key, value = inputs
    with sdpa_kernel(_DENSE[peer]):
        return scaled_dot_product_attention(query, key, value, mask)


def predict(result: Result, case: Case, provider: str) -> None:
    """Adds what the planner says of a native kernel, as the provider asks it."""
    workload = Workload(
        case.neighborhood.merged,
        case.problem.heads,
        case.problem.head_dim,
        key_mask=case.shown is not None,
    )
    cut = plan(workload, provider)
    result.predicted_ms = cut.milliseconds
    result.predicted_speedup = speedups(cut).predicted
    if OURS in result.ms:
        result.prediction_error = cut.milliseconds / result.ms[OURS] - 1


def summary(result: Result) -> str:
    """A line for each case while it runs, with all that did not work."""
    parts = [f"{peer} {ms:.3f} ms" for peer, ms in result.ms.items()]
    if result.of_goal is not None:
        parts.append(f"{result.speedups[OURS]:.2f}x, {result.of_goal:.1%} of the goal")
    parts += [f"{peer} failed: {reason}" for peer, reason in result.failed.items()]
    return f"{result.case}: {', '.join(parts)}"


def table(results: Iterable[Result]) -> Table:
    """All figures but the single ratios."""
    columns = ["case", "FA2 ms", "flex ms", "masked ms", "cuDNN ms", "ours ms", "FA2", "flex"]
    columns += ["ours", "goal", "of goal", "bound", "of bound", "TFLOP/s", "predicted", "error"]
    text = Table(
        *columns,
        box=None,
        caption="Speedups are over cuDNN's dense attention; ! is a goal missed.",
        padding=(0, 1),
    )
    for column in text.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for result in results:
        ms, gains = result.ms, result.speedups
        missed = result.of_goal is not None and result.of_goal < NEAR_ENOUGH
        text.add_row(
            result.case,
            *(_cell(ms.get(peer), ".2f") for peer in ("fa2", "flex", "cudnn-masked", "cudnn")),
            _cell(ms.get(OURS), ".3f"),
            *(_cell(gains.get(peer), ".2f") for peer in ("fa2", "flex", OURS)),
            _cell(result.goal, ".2f"),
            _cell(result.of_goal, ".1%") + (" !" if missed else ""),
            _cell(result.bound, ".2f"),
            _cell(gains[OURS] / result.bound if OURS in gains else None, ".0%"),
            _cell(result.tflops.get(OURS), ".0f"),
            _cell(result.predicted_ms, ".3f"),
            _cell(result.prediction_error, "+.1%"),
        )
    return text


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


if __name__ == "__main__":
    typer.run(main)
