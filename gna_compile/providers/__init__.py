"""Which provider runs a problem: the one question that both the rewrite and the op ask."""

from __future__ import annotations

from gna_compile.providers.cpu import Cpu
from gna_compile.providers.flex import Flex
from gna_compile.providers.portable import Portable
from gna_compile.providers.problem import Declined, Forecast, Problem, Provider
from gna_compile.providers.sm90 import Sm90
from gna_compile.providers.sm100 import Sm100

__all__ = ["PROVIDERS", "Declined", "Forecast", "Problem", "Provider", "choose"]

PROVIDERS: list[Provider] = [Cpu(), Sm100(), Sm90(), Flex(), Portable()]
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
