"""What holds for every test: the same examples everywhere, and nothing compiled by another test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "gna", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gna")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Test models share code, and Dynamo counts recompilations by code."""
    yield
    torch._dynamo.reset()
