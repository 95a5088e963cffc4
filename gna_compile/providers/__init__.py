"""Which provider runs a problem: the one question that both the rewrite and the op ask."""

from __future__ import annotations

from gna_compile.planner.architectures import SM90, SM100
from gna_compile.providers.cpu.provider import Cpu
from gna_compile.providers.cuda.provider import NativeCuda
from gna_compile.providers.flex.provider import Flex
from gna_compile.providers.portable.provider import Portable
from gna_compile.providers.problem import (
    Declined,
    Forecast,
    Forward,
    Gradients,
    Inputs,
    OutputGradients,
    Problem,
    Provider,
)

__all__ = [
    "PROVIDERS",
    "Declined",
    "Forecast",
    "Forward",
    "Gradients",
    "Inputs",
    "OutputGradients",
    "Problem",
    "Provider",
    "choose",
]

PROVIDERS: list[Provider] = [Cpu(), NativeCuda(SM100), NativeCuda(SM90), Flex(), Portable()]
"""All providers, best first."""


def choose(problem: Problem, *, allow_slow: bool = True, name: str = "") -> Provider | Declined:
    """The best provider that can run `problem`, or why none can.

    Args:
        problem: what to run.
        allow_slow: also take a provider that does not count as fast on the problem's device.
        name: take this provider and no other; "" lets this function choose.

    Returns:
        The provider, or `Declined` with the reason of each provider that was asked.

    Raises:
        ValueError: if no provider is called `name`.
    """
    providers = [provider for provider in PROVIDERS if name in ("", provider.name)]
    if not providers:
        known = ", ".join(repr(provider.name) for provider in PROVIDERS)
        raise ValueError(f"there is no provider {name!r}; there are {known} (or '' to choose)")
    reasons: dict[str, str] = {}
    for provider in providers:
        reason = provider.supports(problem)
        if reason is None and not allow_slow and problem.device not in provider.fast_on:
            reason = f"not fast on {problem.device}"
        if reason is None:
            return provider
        reasons[provider.name] = reason
    return Declined(reasons)
