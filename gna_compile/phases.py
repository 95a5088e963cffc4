"""Phases: named stretches of a run that a policy gives rules of their own.

All phases whose decisions differ are lowered when a graph is compiled, so switching is a lookup:
no recompilation, no guard. The current phase belongs to the calling thread (or async task).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

DEFAULT = "default"

_current: ContextVar[str] = ContextVar("gna_phase", default=DEFAULT)


def current_phase() -> str:
    """The phase of the calling thread; "default" until `set_phase` is called in it."""
    return _current.get()


def set_phase(name: str) -> None:
    """Switches the calling thread to the phase `name`, for every compiled model it runs.

    A model whose policy has no such phase raises `ValueError` at its next call.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"a phase is a non-empty string, not {name!r}")
    _current.set(name)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Runs a `with` block in the phase `name` and restores the previous one after it."""
    before = current_phase()
    set_phase(name)
    try:
        yield
    finally:
        _current.set(before)


class PhaseSchedule:
    """A diffusers `callback_on_step_end` that runs the first steps in one phase and the rest in another.

    Entering the phase of the first step happens here, at construction, and again when the last
    step of a run ends, so one schedule serves several runs of the pipeline.

        schedule = gna_compile.PhaseSchedule("warmup", steps=15)
        pipe(prompt, num_inference_steps=50, callback_on_step_end=schedule)

    Args:
        first: phase of the first `steps` steps.
        steps: how many denoising steps run in it, at least 0.
        then: phase of the steps after them.
    """

    def __init__(self, first: str, steps: int, then: str = DEFAULT) -> None:
        if steps < 0:
            raise ValueError(f"steps must be at least 0, not {steps}")
        self.first, self.steps, self.then = first, steps, then
        self._enter(0)

    def __call__(
        self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        total = getattr(pipe, "num_timesteps", None)
        self._enter(0 if total is not None and step + 1 >= total else step + 1)
        return callback_kwargs

    def _enter(self, step: int) -> None:
        set_phase(self.first if step < self.steps else self.then)
