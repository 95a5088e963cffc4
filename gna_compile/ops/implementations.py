"""What the ops do, for every device: check, choose a provider, allocate; and their fakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gna_compile import _torch, providers
from gna_compile.geometry import AttentionPattern
from gna_compile.ops.checks import (
    check_geometry_if_known,
    check_layouts,
    check_results,
    check_tangents,
    check_tensors,
    logsumexp_dtype,
    neighborhood_of,
)
from gna_compile.ops.schema import BackwardCall, ForwardCall, Geometry, TangentCall
from gna_compile.providers import Declined, Forward, Gradients, Inputs, Problem, Provider
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
    problem, provider = _resolve(call.inputs, call.geometry, call.provider)
    results = _empty_results(call.inputs.query, call.output_order)
    if results.output.numel():
        with _torch.AutoDispatchBelowAutograd(), _without_autocast():
            provider.forward(problem, call.inputs, results)
    return results


def backward(*args: Any) -> Gradients:
    call = BackwardCall.of(*args)
    problem, provider = _resolve(call.inputs, call.geometry, call.provider)
    check_results(call.inputs.query, call.forward, call.given)
    gradients = _empty_gradients(call.inputs)
    if not call.inputs.query.numel():
        # Without query heads there still are key heads, which nothing flows back to.
        return Gradients(gradients.query, gradients.key.zero_(), gradients.value.zero_())
    with _torch.AutoDispatchBelowAutograd(), _without_autocast():
        provider.backward(problem, call.inputs, call.forward, call.given, gradients)
    return gradients


def tangent(*args: Any) -> Forward:
    call = TangentCall.of(*args)
    # Derivatives of this kind are rare: the provider that runs everywhere is enough.
    problem, _ = _resolve(call.inputs, call.geometry, "portable")
    check_tangents(call.inputs, call.moving, call.logsumexp)
    tangents = _empty_results(call.inputs.query, call.output_order)
    if tangents.output.numel():
        with _torch.AutoDispatchBelowAutograd(), _without_autocast():
            write_tangents(problem, call.inputs, call.moving, call.logsumexp, tangents)
    return tangents


def forward_fake(*args: Any) -> Forward:
    call = ForwardCall.of(*args)
    check_tensors(call.inputs, call.geometry)
    check_geometry_if_known(call.inputs.query, call.geometry)
    return _empty_results(call.inputs.query, call.output_order)


def backward_fake(*args: Any) -> Gradients:
    call = BackwardCall.of(*args)
    check_tensors(call.inputs, call.geometry)
    check_results(call.inputs.query, call.forward, call.given)
    return _empty_gradients(call.inputs)


def tangent_fake(*args: Any) -> Forward:
    call = TangentCall.of(*args)
    check_tensors(call.inputs, call.geometry)
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

_resolved: dict[tuple[Any, ...], tuple[Problem, Provider]] = {}
_MAX_RESOLVED = 4096


def _resolve(inputs: Inputs, geometry: Geometry, provider: str) -> tuple[Problem, Provider]:
    """The problem and who runs it; checked once, then remembered for these shapes and strides."""
    query, key, value, key_mask, _ = inputs
    grid, window, stride, dilation, causal, prefix, suffix = geometry
    check_layouts(inputs)
    facts = (
        (*grid, *window, *stride, *dilation, *causal, prefix, suffix),
        # Entries of different lengths must not run together to the same facts.
        (len(grid), len(window), len(stride), len(dilation), provider),
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
        check_tensors(inputs, geometry)
        if len(_resolved) >= _MAX_RESOLVED:
            _resolved.clear()
        known = _resolved[facts] = _choose(inputs, geometry, provider)
    return known


def _choose(inputs: Inputs, geometry: Geometry, provider: str) -> tuple[Problem, Provider]:
    query, key, value, key_mask, _ = inputs
    batch, heads, tokens, head_dim = query.shape
    problem = Problem(
        device=query.device.type,
        dtype=query.dtype,
        batch=batch,
        heads=heads,
        kv_heads=key.shape[1],
        head_dim=head_dim,
        pattern=AttentionPattern.of_neighborhood(neighborhood_of(geometry, tokens), heads),
        has_key_mask=key_mask is not None,
        query_strides=query.stride(),
        key_strides=key.stride(),
        value_strides=value.stride(),
    )
    chosen = providers.choose(problem, name=provider)
    if isinstance(chosen, Declined):
        who = f"provider {provider!r} cannot" if provider else "no provider can"
        raise RuntimeError(f"{who} run this attention ({chosen}); {problem}")
    return problem, chosen
