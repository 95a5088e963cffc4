"""How autograd sees the ops: once in reverse and once in forward mode.

`_setup_context` and `_gradient` are the autograd formula that the op's version stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gna_compile import _torch
from gna_compile.ops import implementations
from gna_compile.ops.schema import BACKWARD as _BACKWARD
from gna_compile.ops.schema import FORWARD as _FORWARD
from gna_compile.ops.schema import TANGENT as _TANGENT


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, pattern, key_mask, scale, _, provider = inputs
    ctx.save_for_backward(query, key, value, *output, key_mask)
    ctx.rest = (pattern, scale, provider)
    # An unused logsumexp then costs nothing.
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> Any:
    nothing = (None,) * 5
    if grad_output is None and grad_logsumexp is None:
        return (None, None, None, *nothing)
    query, key, value, output, logsumexp, key_mask = ctx.saved_tensors
    pattern, scale, provider = ctx.rest
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    grads = _BACKWARD(
        grad_output,
        grad_logsumexp,
        query,
        key,
        value,
        output,
        logsumexp,
        pattern,
        key_mask,
        scale,
        provider,
    )
    needed = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)]
    return (*needed, *nothing)


def _forward_gradient(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
    query, key, value, logsumexp, key_mask = ctx.saved_tensors
    pattern, scale, _ = ctx.rest
    moving = [
        torch.zeros_like(operand) if tangent is None else tangent
        for operand, tangent in zip((query, key, value), tangents[:3], strict=True)
    ]
    pair: tuple[Tensor, Tensor] = _TANGENT(
        *moving, query, key, value, logsumexp, pattern, key_mask, scale, ctx.output_order
    )
    return pair


def _second_gradient(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        "gna::attention can be differentiated once; for second derivatives, in forward or in "
        "reverse mode, use the dense attention"
    )


class _Attention(_torch.SingleLevelFunction):
    """How autograd sees the op. The last argument is the dispatch keys that called it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *inputs, keyset = args
        output, logsumexp = _below_autograd(_FORWARD, keyset, inputs)
        _setup_context(ctx, tuple(inputs), (output, logsumexp))
        query, key, value, *_, key_mask, _, output_order, _ = inputs
        ctx.save_for_forward(query, key, value, logsumexp, key_mask)
        ctx.output_order = output_order
        return output, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*_gradient(ctx, *grads), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        return _forward_gradient(ctx, *tangents)


class _Derivative(_torch.SingleLevelFunction):
    """How autograd sees the op's derivatives: as not differentiable. First argument: which."""

    @staticmethod
    def forward(ctx: Any, op: Any, *args: Any) -> tuple[Tensor, ...]:
        *inputs, keyset = args
        return _below_autograd(op, keyset, inputs)

    backward = staticmethod(_second_gradient)
    jvp = staticmethod(_second_gradient)


# Where nothing else lies below autograd, calling the implementation itself spares a call through the
# dispatcher, a sixth of a small call's time.
_ONLY_DEVICES = (
    _torch.DispatchKeySet(_torch.DispatchKey.CPU),
    _torch.DispatchKeySet(_torch.DispatchKey.CUDA),
)
_IMPLEMENTATIONS: dict[Any, Callable[..., tuple[Tensor, ...]]] = {
    _FORWARD: implementations.forward,
    _BACKWARD: implementations.backward,
    _TANGENT: implementations.tangent,
}


def _below_autograd(op: Any, keyset: Any, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Calls what lies below autograd: the real implementation, or the next functorch transform."""
    below = keyset & _torch.after_autograd_keyset
    is_transformed = _torch.are_functorch_transforms_active()
    if below in _ONLY_DEVICES and not is_transformed:
        return _IMPLEMENTATIONS[op](*args)
    with _torch.AutoDispatchBelowAutograd():
        if not is_transformed:
            return tuple(op.redispatch(below, *args))
        # An autograd function switches derivatives off, which would end the transforms around it.
        with torch.enable_grad(), _torch.set_forward_gradient_enabled(True):
            return tuple(op.redispatch(below, *args))


def _may_be_differentiated(args: Sequence[Any]) -> bool:
    """False only where an autograd function would do nothing but cost a sixth of a small call's time."""
    # Whether an operand has a tangent is not told from here, only whether one could have.
    if _torch.forward_gradient_level() >= 0 or _torch.are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(
        arg.requires_grad for arg in args if isinstance(arg, Tensor)
    )


def _apply(function: Any, *args: Any) -> Any:
    """Calls an autograd function from within a kernel, where one transform is at work at most."""
    if not _torch.are_functorch_transforms_active():
        return function.apply(*args)
    with _torch.enable_single_level_autograd_function():
        return function.apply(*args)


def attention(keyset: Any, *args: Any) -> Any:
    if not _may_be_differentiated(args[:3]):
        return _below_autograd(_FORWARD, keyset, args)
    # The dispatcher leaves out an argument that has its default.
    defaults = ("",) if len(args) < len(_torch.arguments(_FORWARD)) else ()
    return _apply(_Attention, *args, *defaults, keyset)


def not_differentiable(op: Any) -> Callable[..., Any]:
    def kernel(keyset: Any, *args: Any) -> Any:
        if not _may_be_differentiated(args):
            return _below_autograd(op, keyset, args)
        return _apply(_Derivative, op, *args, keyset)

    return kernel
