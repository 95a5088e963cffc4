"""Phases: named stretches of a run that a policy gives rules of their own.

All phases are decided when a graph is compiled, so switching is a lookup: no recompilation, no guard.
Each graph that their decisions lead to is lowered once, when a phase that has it first runs (at once,
if shapes are symbolic). The current phase belongs to the calling thread (or async task).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from gna_compile.policy import DEFAULT_PHASE, load_policy

_declared: set[str] = {DEFAULT_PHASE}
_current: ContextVar[str] = ContextVar("gna_phase", default=DEFAULT_PHASE)


def current_phase() -> str:
    """The phase of the calling thread; "default" until `set_phase` is called in it."""
    return _current.get()


def set_phase(name: str) -> None:
    """Switches the calling thread to the phase `name`, for every compiled model it runs.

    A model whose policy has no such phase runs its default phase if another loaded policy has it;
    if none has, the model's next call raises `ValueError`.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"a phase is a non-empty string, not {name!r}")
    _current.set(name)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Runs a `with` block in the phase `name` and restores the previous one after it.

    A checkpoint around a compiled model runs it again in the backward pass, in the phase that the
    thread of the backward pass is in: give such a checkpoint a `context_fn` that sets the phase.
    """
    before = current_phase()
    set_phase(name)
    try:
        yield
    finally:
        _current.set(before)


def declare(names: Iterable[str]) -> None:
    """Says that a policy in use has these phases."""
    _declared.update(names)


def known_phase(phases: Container[str]) -> str:
    """The current phase if it is among a policy's `phases`, the default if it is another policy's.

    Raises:
        ValueError: if no policy in use has the current phase.
    """
    current = current_phase()
    if current in phases:
        return current
    if current not in _declared:
        known = ", ".join(map(repr, sorted(_declared)))
        raise ValueError(f"no policy in use has a phase {current!r}; there are {known}")
    return DEFAULT_PHASE


class PhaseSchedule:
    """A diffusers `callback_on_step_end` that runs each denoising step in its phase.

    Entering the phase of the first step happens here, at construction, and again when the last
    step of a run ends, so one schedule serves several runs of the pipeline.

        schedule = gna_compile.PhaseSchedule("flux-4k", steps=28)   # as the policy says
        pipe(prompt, num_inference_steps=28, callback_on_step_end=schedule)

    Args:
        policy: whose phases to follow: `phases: {warmup: {first: 9, of: 28}}`. Anything that
            `load_policy` takes.
        steps: how many denoising steps a run has, at least 1.
    """

    def __init__(self, policy: Any, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        self.policy, self.steps = load_policy(policy), steps
        set_phase(self.policy.phase_at(0, steps))

    def __call__(
        self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        set_phase(self.policy.phase_at((step + 1) % self.steps, self.steps))
        return callback_kwargs
