"""Who runs which heads: one problem and one provider for each head group of a pattern.

A head group's tensors are views of the op's, so a provider knows nothing of groups: groups cost a
launch each, and a copy of the logsumexp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from gna_compile import providers
from gna_compile.geometry import AttentionPattern, HeadGroup, of_heads
from gna_compile.ops.checks import pattern_of
from gna_compile.providers import (
    Declined,
    Forward,
    Gradients,
    Inputs,
    OutputGradients,
    Problem,
    Provider,
)

_Rows = TypeVar("_Rows", Forward, OutputGradients)

_of_heads = lru_cache(maxsize=1024)(of_heads)


@dataclass(frozen=True)
class Part:
    """The heads of one group: what is asked, of whom, and where they lie.

    Attributes:
        problem: of these heads.
        provider: who runs it.
        query_heads: their place among the query heads; None if they are all.
        key_heads: their place among the key heads; None if they are all.
    """

    problem: Problem
    provider: Provider
    query_heads: slice | None = None
    key_heads: slice | None = None

    def heads(self, tensor: Tensor) -> Tensor:
        """These heads of anything that has the query's."""
        return tensor if self.query_heads is None else tensor[:, self.query_heads]

    def inputs(self, inputs: Inputs) -> Inputs:
        if self.query_heads is None:
            return inputs
        return inputs._replace(
            query=inputs.query[:, self.query_heads],
            key=inputs.key[:, self.key_heads],
            value=inputs.value[:, self.key_heads],
        )

    def rows(self, tensors: _Rows) -> _Rows:
        """These heads of results, or of their gradients, to be read."""
        if self.query_heads is None:
            return tensors
        logsumexp = tensors.logsumexp
        return tensors._replace(
            output=self.heads(tensors.output),
            logsumexp=None if logsumexp is None else self.heads(logsumexp).contiguous(),
        )

    @contextmanager
    def results(self, results: Forward) -> Iterator[Forward]:
        """Where these heads' results go: views, but a logsumexp of their own, as it is contiguous."""
        if self.query_heads is None:
            yield results
            return
        here = self.heads(results.logsumexp)
        logsumexp = (
            here
            if here.is_contiguous()
            else torch.empty_like(here, memory_format=torch.contiguous_format)
        )
        yield Forward(self.heads(results.output), logsumexp)
        if logsumexp is not here:
            here.copy_(logsumexp)

    def gradients(self, gradients: Gradients) -> Gradients:
        if self.query_heads is None:
            return gradients
        return Gradients(
            gradients.query[:, self.query_heads],
            gradients.key[:, self.key_heads],
            gradients.value[:, self.key_heads],
        )


def parts_of(inputs: Inputs, ints: Sequence[int], provider: str) -> tuple[Part, ...]:
    """The parts of a call.

    Raises:
        ValueError: if the pattern is not of these tensors, or a group splits the query heads of one
            key head.
        RuntimeError: if no provider, or not the named one, can run a part.
    """
    pattern = pattern_of(inputs, ints)
    groups = pattern.head_groups
    if len(groups) == 1:
        return (_part(inputs, pattern, groups[0], None, None, provider),)
    shared = inputs.query.shape[1] // inputs.key.shape[1]
    parts, first = [], 0
    for number, group in enumerate(groups):
        if group.heads % shared:
            raise ValueError(
                f"head group {number} has {group.heads} heads, but {shared} query heads share a key "
                f"head: a group must have a multiple of {shared}"
            )
        stop = first + group.heads
        if group.heads:
            query_heads, key_heads = slice(first, stop), slice(first // shared, stop // shared)
            parts.append(_part(inputs, pattern, group, query_heads, key_heads, provider))
        first = stop
    return tuple(parts)


def _part(
    inputs: Inputs,
    pattern: AttentionPattern,
    group: HeadGroup,
    query_heads: slice | None,
    key_heads: slice | None,
    name: str,
) -> Part:
    query, key, value, key_mask, _ = inputs
    problem = Problem(
        device=query.device.type,
        dtype=query.dtype,
        batch=query.shape[0],
        heads=group.heads,
        kv_heads=key[:, key_heads].shape[1] if key_heads else key.shape[1],
        head_dim=query.shape[3],
        pattern=_of_heads(pattern, group),
        has_key_mask=key_mask is not None,
        query_strides=query.stride(),
        key_strides=key.stride(),
        value_strides=value.stride(),
    )
    chosen = providers.choose(problem, name=name)
    if isinstance(chosen, Declined):
        who = f"provider {name!r} cannot" if name else "no provider can"
        raise RuntimeError(f"{who} run this attention ({chosen}); {problem}")
    return Part(problem, chosen, query_heads, key_heads)
