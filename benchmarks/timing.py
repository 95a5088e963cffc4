"""How candidates are timed: each runs once to see whether it can, then their runs are interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from textwrap import shorten
from typing import TypeVar

import torch

T = TypeVar("T")
Run = Callable[[], object]
Clock = Callable[[Run, int, int], float]

_SHORTEST = 20.0  # milliseconds that one turn takes at least; short calls are repeated within it
_SETTLING = 100.0  # and that its candidate runs right before, uncounted


def first_calls(runs: dict[str, Callable[[], T]]) -> tuple[dict[str, T], dict[str, str]]:
    """What each returns, and why those that failed did."""
    results: dict[str, T] = {}
    failed: dict[str, str] = {}
    for name, run in runs.items():
        try:
            result = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:
            failed[name] = shorten(f"{type(error).__name__}: {error}", 160)
        else:
            results[name] = result
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results, failed


def clock(device: str) -> Clock:
    """A function (run, uncounted calls, counted calls) -> mean milliseconds of a counted call."""
    return _on_cuda if device == "cuda" else _on_cpu


def _on_cuda(run: Run, before: int, calls: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(before):
        run()
    start.record()  # with the queue full, so that no launch adds a gap
    for _ in range(calls):
        run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / calls


def _on_cpu(run: Run, before: int, calls: int) -> float:
    for _ in range(before):
        run()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return 1e3 * (time.perf_counter() - start) / calls


def take_turns(runs: Mapping[str, Run], repeats: int, measure: Clock) -> dict[str, list[float]]:
    """Milliseconds a call of each, in interleaved runs.

    A GPU's clock follows its load and heat. So a run begins with calls that are not counted, until
    the clock is the candidate's and not that of the candidate before, and the last two candidates
    swap places from round to round.
    """
    once = {name: measure(run, 0, 1) for name, run in runs.items()}
    calls, settling = (
        {name: max(1, round(least / once[name])) for name in runs}
        for least in (_SHORTEST, _SETTLING)
    )
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else [*names[:-2], *names[:-3:-1]]:
            times[name].append(measure(runs[name], settling[name], calls[name]))
    return times


def speedups(times: dict[str, list[float]], over: str) -> dict[str, list[float]]:
    """Ratios of the turns of `over` to those of each other candidate; empty if it did not run."""
    if over not in times:
        return {}
    return {
        name: [base / other for base, other in zip(times[over], turns, strict=True)]
        for name, turns in times.items()
        if name != over
    }


def medians(turns: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in turns.items()}
