"""What the ops do, for every device: check, choose a provider, allocate; and their fakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gna_compile import _torch, providers
from gna_compile.ops.checks import (
    check_layouts,
    check_results,
    check_tangents,
    check_tensors,
    logsumexp_dtype,
)
from gna_compile.ops.head_groups import Part, parts_of
from gna_compile.ops.schema import BackwardCall, ForwardCall, TangentCall
from gna_compile.providers import Forward, Gradients, Inputs
from gna_compile.providers.portable.tangents import write_tangents

# Inside a provider there is neither autograd nor autocast: the op is one step for both, and the
# backward must compute in its own types even when it is called within an autocast block.
AUTOCAST_KEYS = {
    "cpu": _torch.DispatchKeySet(_torch.DispatchKey.AutocastCPU),
    "cuda": _torch.DispatchKeySet(_torch.DispatchKey.AutocastCUDA),
}
_ALL_AUTOCAST = AUTOCAST_KEYS["cpu"] | AUTOCAST_KEYS["cuda"]


def _without_autocast() -> Any:
    return _torch.ExcludeDispatchKeyGuard(_ALL_AUTOCAST)


def forward(*args: Any) -> Forward:
    call = ForwardCall.of(*args)
    parts = _resolve(call.inputs, call.pattern, call.provider)
    results = _empty_results(call.inputs.query, call.output_order)
    if results.output.numel():
        with _torch.AutoDispatchBelowAutograd(), _without_autocast():
            for part in parts:
                with part.results(results) as own:
                    part.provider.forward(part.problem, part.inputs(call.inputs), own)
    return results


def backward(*args: Any) -> Gradients:
    call = BackwardCall.of(*args)
    parts = _resolve(call.inputs, call.pattern, call.provider)
    check_results(call.inputs.query, call.forward, call.given)
    gradients = _empty_gradients(call.inputs)
    if not call.inputs.query.numel():
        # Without query heads there still are key heads, which nothing flows back to.
        return Gradients(gradients.query, gradients.key.zero_(), gradients.value.zero_())
    with _torch.AutoDispatchBelowAutograd(), _without_autocast():
        for part in parts:
            part.provider.backward(
                part.problem,
                part.inputs(call.inputs),
                part.rows(call.forward),
                part.rows(call.given),
                part.gradients(gradients),
            )
    return gradients


def tangent(*args: Any) -> Forward:
    call = TangentCall.of(*args)
    # Derivatives of this kind are rare: the provider that runs everywhere is enough.
    parts = _resolve(call.inputs, call.pattern, "portable")
    check_tangents(call.inputs, call.moving, call.logsumexp)
    tangents = _empty_results(call.inputs.query, call.output_order)
    if tangents.output.numel():
        with _torch.AutoDispatchBelowAutograd(), _without_autocast():
            for part in parts:
                with part.results(tangents) as own:
                    write_tangents(
                        part.problem,
                        part.inputs(call.inputs),
                        part.inputs(call.moving),
                        part.heads(call.logsumexp),
                        own,
                    )
    return tangents


def forward_fake(*args: Any) -> Forward:
    call = ForwardCall.of(*args)
    check_tensors(call.inputs, call.pattern)
    return _empty_results(call.inputs.query, call.output_order)


def backward_fake(*args: Any) -> Gradients:
    call = BackwardCall.of(*args)
    check_tensors(call.inputs, call.pattern)
    check_results(call.inputs.query, call.forward, call.given)
    return _empty_gradients(call.inputs)


def tangent_fake(*args: Any) -> Forward:
    call = TangentCall.of(*args)
    check_tensors(call.inputs, call.pattern)
    check_tangents(call.inputs, call.moving, call.logsumexp)
    return _empty_results(call.inputs.query, call.output_order)


def _empty_results(query: Tensor, output_order: Sequence[int]) -> Forward:
    """Output, dense in memory with its dimensions in this order, outermost first; logsumexp."""
    if sorted(output_order) != [0, 1, 2, 3]:
        raise ValueError(
            f"output_order {list(output_order)} must be a permutation of 0, 1, 2, 3: the "
            "dimensions of the output, outermost in memory first"
        )
    output = torch.empty_permuted(
        query.shape, tuple(output_order), dtype=query.dtype, device=query.device
    )
    return Forward(output, query.new_empty(query.shape[:3], dtype=logsumexp_dtype(query)))


def _empty_gradients(inputs: Inputs) -> Gradients:
    return Gradients(*map(torch.empty_like, inputs[:3]))


# Who runs a problem ------------------------------------------------------------------------------

_resolved: dict[tuple[Any, ...], tuple[Part, ...]] = {}
_MAX_RESOLVED = 4096


def _resolve(inputs: Inputs, pattern: Sequence[int], provider: str) -> tuple[Part, ...]:
    """Who runs which heads; checked once, then remembered for these shapes and strides."""
    query, key, value, key_mask, _ = inputs
    check_layouts(inputs)
    facts = (
        (*pattern,),
        provider,
        (query.device, query.dtype, query.shape, query.stride()),
        (key.device, key.dtype, key.shape, key.stride()),
        (value.device, value.dtype, value.shape, value.stride()),
        None
        if key_mask is None
        else (key_mask.device, key_mask.dtype, key_mask.shape, key_mask.stride()),
        *providers.PROVIDERS,
    )
    known = _resolved.get(facts)
    if known is None:
        check_tensors(inputs, pattern)
        if len(_resolved) >= _MAX_RESOLVED:
            _resolved.clear()
        known = _resolved[facts] = parts_of(inputs, pattern, provider)
    return known
