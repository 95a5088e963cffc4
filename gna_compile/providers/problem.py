"""What a provider is asked to run, and what a provider is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gna_compile.geometry import AttentionPattern


@dataclass(frozen=True)
class Problem:
    """Everything a provider may look at to say whether it can run: no tensor, no value of one.

    Args:
        device: device type, such as "cpu" or "cuda".
        dtype: element type of query, key and value.
        batch: batch size.
        heads: query heads.
        kv_heads: key and value heads; divides `heads`.
        head_dim: elements of a head.
        pattern: which keys each query sees; one head group, of `heads` heads.
        has_key_mask: whether global keys may be hidden.
        query_strides: of the query [batch, heads, tokens, head_dim], in elements.
        key_strides: of the key [batch, kv_heads, tokens, head_dim], in elements.
        value_strides: of the value [batch, kv_heads, tokens, head_dim], in elements.
    """

    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    pattern: AttentionPattern
    has_key_mask: bool
    query_strides: tuple[int, ...]
    key_strides: tuple[int, ...]
    value_strides: tuple[int, ...]

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        """Computed once, as every call looks something up by its problem."""
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # The hash is another one in another process.
        return {name: value for name, value in vars(self).items() if name != "_hash"}


class Inputs(NamedTuple):
    """What is attended to, and with what.

    Attributes:
        query: [batch, heads, query tokens, head_dim].
        key: [batch, kv_heads, key tokens, head_dim].
        value: like key.
        key_mask: bool [batch, global keys], False where a global key is hidden; or None.
        scale: of the logits before the softmax.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    scale: float


class Forward(NamedTuple):
    """The forward's results: `output` like query and `logsumexp` [batch, heads, tokens]."""

    output: Tensor
    logsumexp: Tensor


class OutputGradients(NamedTuple):
    """The gradients of the forward's results, which flow into the backward."""

    output: Tensor
    logsumexp: Tensor | None


class Gradients(NamedTuple):
    """The gradients of query, key and value, each like its tensor."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Forecast:
    """What a provider expects of a problem before it runs.

    Args:
        speedup: over dense attention on the problem's device; None where nothing was measured.
        hint: how the policy could make it faster, in words; "" if there is nothing to say.
    """

    speedup: float | None = None
    hint: str = ""


class Provider(Protocol):
    """An implementation of the op on some hardware.

    All tensors of one call are on one device and were validated by the op; batch, heads and tokens
    are at least 1. The forward's results and the gradients are allocated by the op: a provider
    writes every element of them, whatever their strides, and keeps no reference.
    """

    @property
    def name(self) -> str:
        """The name that policies, reports and the op's `provider` argument use."""
        ...

    @property
    def fast_on(self) -> frozenset[str]:
        """Device types on which it counts as fast."""
        ...

    def supports(self, problem: Problem) -> str | None:
        """Why it cannot run `problem`, in a few words, or None if it can."""
        ...

    def forecast(self, problem: Problem) -> Forecast:
        """How fast it will run a problem that it supports, by the costs of what it really does."""
        ...

    def forward(self, problem: Problem, inputs: Inputs, results: Forward) -> None:
        """Writes `results`."""
        ...

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        forward: Forward,
        given: OutputGradients,
        gradients: Gradients,
    ) -> None:
        """Writes `gradients`; `forward` is what `forward` wrote, `given` the gradients of that."""
        ...


@dataclass(frozen=True)
class Declined:
    """No provider takes the problem.

    Args:
        reasons: each provider's own reason, by its name.
    """

    reasons: dict[str, str]

    def __str__(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
