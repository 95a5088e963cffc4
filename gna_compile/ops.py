"""The op: `torch.ops.gna.attention.v1`, its derivatives, and how PyTorch sees them.

Defined with `torch.library.Library.define`, which costs about half of `custom_op` per call. The
overload name is the version of the schema *and* of the autograd formula: compiled graphs are cached
by the op's name, so a changed formula under an old name would meet cache entries of the old one.

Shapes throughout: query and output [B, H, N, D], key and value [B, Hkv, N, D] with Hkv dividing H,
logsumexp [B, H, N], key_mask [B, prefix + suffix], N = prefix + product of grid + suffix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from gna_compile import flops, providers
from gna_compile.geometry import Neighborhood
from gna_compile.providers import (
    Declined,
    Forward,
    Gradients,
    Inputs,
    OutputGradients,
    Problem,
    Provider,
)
from gna_compile.providers.portable.tangents import write_tangents

_GEOMETRY = (
    "SymInt[] grid, SymInt[] window, SymInt[] stride, SymInt[] dilation, bool[] causal, "
    "SymInt prefix, SymInt suffix, Tensor? key_mask, float scale"
)
FORWARD_SCHEMA = (
    f"attention.v1(Tensor query, Tensor key, Tensor value, {_GEOMETRY}, int[] output_order, "
    'str provider="") -> (Tensor output, Tensor logsumexp)'
)
BACKWARD_SCHEMA = (
    "attention_backward.v1(Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key, "
    f"Tensor value, Tensor output, Tensor logsumexp, {_GEOMETRY}, "
    'str provider="") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)'
)
TANGENT_SCHEMA = (
    "attention_tangent.v1(Tensor tangent_query, Tensor tangent_key, Tensor tangent_value, "
    f"Tensor query, Tensor key, Tensor value, Tensor logsumexp, {_GEOMETRY}, int[] output_order) "
    "-> (Tensor tangent_output, Tensor tangent_logsumexp)"
)

_library = torch.library.Library("gna", "DEF")
for _schema in (FORWARD_SCHEMA, BACKWARD_SCHEMA, TANGENT_SCHEMA):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_FORWARD = torch.ops.gna.attention.v1
_BACKWARD = torch.ops.gna.attention_backward.v1
_TANGENT = torch.ops.gna.attention_tangent.v1
_FORWARD_NAME = "gna::attention.v1"
_BACKWARD_NAME = "gna::attention_backward.v1"
_TANGENT_NAME = "gna::attention_tangent.v1"


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    causal: Sequence[bool] | None = None,
    prefix: int = 0,
    suffix: int = 0,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_logsumexp: bool = False,
    provider: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """Generalized neighbourhood attention over a grid of tokens, with global tokens around it.

    In place of `scaled_dot_product_attention`: the same tensors, and a window instead of a mask.

        >>> q = k = v = torch.randn(1, 12, 8 * 24 * 32, 64)
        >>> out = neighborhood_attention(q, k, v, grid=(8, 24, 32), window=(4, 12, 16))
        >>> out.shape
        torch.Size([1, 12, 6144, 64])

    Tokens lie as `prefix` global tokens, the grid in raster order (last axis fastest), `suffix`
    global tokens: N = prefix + product of grid + suffix. A global token sees all tokens and all
    tokens see it. Everything per axis has one entry for each of the grid's one to three axes.

    Args:
        query: [B, H, N, D], fp32, fp16, bf16 or fp64, any strides.
        key: [B, Hkv, N, D], Hkv dividing H (grouped-query heads), dtype and device of query.
        value: like key.
        grid: tokens along each axis.
        window: keys that a query sees along each axis; window * dilation <= grid.
        stride: queries that share one window; 1 <= stride <= window. Default 1 everywhere.
        dilation: step between the keys of one window. Default 1 everywhere.
        causal: whether an axis hides later keys from earlier queries. Default: no axis does.
        prefix: global tokens before the grid.
        suffix: global tokens after the grid.
        key_mask: bool [B, prefix + suffix], False where a global key is hidden (padding).
        scale: of the logits before the softmax. Default 1 / sqrt(D).
        return_logsumexp: also return the logsumexp of each row's logits.
        provider: name of the implementation to use; "" takes the best one that can.

    Returns:
        output, shaped and typed like query, in the memory order of heads and tokens that query
        has; with `return_logsumexp` the pair (output, logsumexp), logsumexp natural, fp32 (fp64
        for fp64), [B, H, N]. Both are differentiable, once, in reverse and in forward mode.

    Raises:
        TypeError: query, key, value or key_mask is not a tensor.
        ValueError: an argument breaks one of these rules; the message names it and its value.
        RuntimeError: no provider, or not the named one, can run this; with each one's reason.
    """
    _check_layouts(query, key, value, key_mask)
    _check_rank("query", query)
    _check_head_dim(query)
    rank = len(grid)
    # A transposed [B, N, H, D] stays one, so that a model's transpose back costs nothing.
    order = [0, 2, 1, 3] if query.stride(1) < query.stride(2) else [0, 1, 2, 3]
    output, logsumexp = _FORWARD(
        query,
        key,
        value,
        list(grid),
        list(window),
        [1] * rank if stride is None else list(stride),
        [1] * rank if dilation is None else list(dilation),
        [False] * rank if causal is None else list(causal),
        prefix,
        suffix,
        key_mask,
        query.shape[3] ** -0.5 if scale is None else scale,
        order,
        provider,
    )
    return (output, logsumexp) if return_logsumexp else output


# The real implementations, for every device ------------------------------------------------------

# Inside a provider there is neither autograd nor autocast: the op is one step for both, and the
# backward must compute in its own types even when it is called within an autocast block.
_AUTOCAST_KEYS = {
    "cpu": torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU),
    "cuda": torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA),
}
_ALL_AUTOCAST = _AUTOCAST_KEYS["cpu"] | _AUTOCAST_KEYS["cuda"]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[bool],
    prefix: int,
    suffix: int,
    key_mask: Tensor | None,
    scale: float,
    output_order: list[int],
    provider: str = "",
) -> tuple[Tensor, Tensor]:
    geometry = (grid, window, stride, dilation, causal, prefix, suffix)
    problem, chosen = _resolve(query, key, value, geometry, key_mask, provider)
    output, logsumexp = _empty_outputs(query, output_order)
    if output.numel():
        with torch._C._AutoDispatchBelowAutograd(), _without_autocast():
            inputs = Inputs(query, key, value, key_mask, scale)
            chosen.forward(problem, inputs, Forward(output, logsumexp))
    return output, logsumexp


def _backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[bool],
    prefix: int,
    suffix: int,
    key_mask: Tensor | None,
    scale: float,
    provider: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = (grid, window, stride, dilation, causal, prefix, suffix)
    problem, chosen = _resolve(query, key, value, geometry, key_mask, provider)
    _check_results(query, grad_output, grad_logsumexp, output, logsumexp)
    grads = Gradients(*map(torch.empty_like, (query, key, value)))
    if not query.numel():
        # Without query heads there still are key heads, which nothing flows back to.
        return grads[0], grads[1].zero_(), grads[2].zero_()
    with torch._C._AutoDispatchBelowAutograd(), _without_autocast():
        chosen.backward(
            problem,
            Inputs(query, key, value, key_mask, scale),
            Forward(output, logsumexp),
            OutputGradients(grad_output, grad_logsumexp),
            grads,
        )
    return grads


def _tangent(
    tangent_query: Tensor,
    tangent_key: Tensor,
    tangent_value: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[bool],
    prefix: int,
    suffix: int,
    key_mask: Tensor | None,
    scale: float,
    output_order: list[int],
) -> tuple[Tensor, Tensor]:
    operands, tangents = (query, key, value), (tangent_query, tangent_key, tangent_value)
    geometry = (grid, window, stride, dilation, causal, prefix, suffix)
    # Derivatives of this kind are rare: the provider that runs everywhere is enough.
    problem, _ = _resolve(query, key, value, geometry, key_mask, "portable")
    _check_tangents(operands, tangents, logsumexp)
    tangent_output, tangent_logsumexp = _empty_outputs(query, output_order)
    if tangent_output.numel():
        with torch._C._AutoDispatchBelowAutograd(), _without_autocast():
            write_tangents(
                problem,
                Inputs(*operands, key_mask, scale),
                Inputs(*tangents, key_mask, scale),
                logsumexp,
                Forward(tangent_output, tangent_logsumexp),
            )
    return tangent_output, tangent_logsumexp


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(_ALL_AUTOCAST)


_resolved: dict[tuple[Any, ...], tuple[Problem, Provider]] = {}
_MAX_RESOLVED = 4096


def _resolve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: tuple[Any, ...],
    key_mask: Tensor | None,
    provider: str,
) -> tuple[Problem, Provider]:
    """The problem and who runs it; checked once, then remembered for these shapes and strides."""
    grid, window, stride, dilation, causal, prefix, suffix = geometry
    _check_layouts(query, key, value, key_mask)
    facts = (
        *_facts(query),
        *_facts(key),
        *_facts(value),
        *(_facts(key_mask) if key_mask is not None else ()),
        *grid,
        *window,
        *stride,
        *dilation,
        *causal,
        prefix,
        suffix,
        # Entries of different lengths must not run together to the same facts.
        (len(grid), len(window), len(stride), len(dilation)),
        provider,
        *providers.PROVIDERS,
    )
    known = _resolved.get(facts)
    if known is None:
        _check_tensors(query, key, value, key_mask, prefix, suffix)
        if len(_resolved) >= _MAX_RESOLVED:
            _resolved.clear()
        known = _resolved[facts] = _choose(query, key, value, geometry, key_mask, provider)
    return known


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.device, tensor.dtype, tensor.shape, tensor.stride())


def _choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: tuple[Any, ...],
    key_mask: Tensor | None,
    provider: str,
) -> tuple[Problem, Provider]:
    batch, heads, tokens, head_dim = query.shape
    problem = Problem(
        device=query.device.type,
        dtype=query.dtype,
        batch=batch,
        heads=heads,
        kv_heads=key.shape[1],
        head_dim=head_dim,
        neighborhood=_neighborhood(geometry, tokens),
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


# What the tensors must be like -------------------------------------------------------------------


def _neighborhood(geometry: tuple[Any, ...], tokens: int) -> Neighborhood:
    neighborhood = Neighborhood.of(*geometry)
    if neighborhood.tokens != tokens:
        raise ValueError(
            f"query has {tokens} tokens, but prefix {neighborhood.prefix} + grid "
            f"{neighborhood.grid} + suffix {neighborhood.suffix} makes {neighborhood.tokens}; "
            "pass the grid that the tokens lie on"
        )
    return neighborhood


_OPERANDS = ("query", "key", "value")


def _check_layout(name: str, tensor: Any) -> None:
    """Raises unless this is a tensor that finds its elements in memory by strides."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
    if tensor.is_nested:
        raise ValueError(
            f"{name} is a nested tensor; it must have one size for each dimension: call once for "
            "each of its tensors"
        )
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"{name} has the layout {tensor.layout}; it must be torch.strided: use "
            f"{name}.to_dense()"
        )


def _check_layouts(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> None:
    """What must hold of all tensors before anything is read off them."""
    for name, tensor in zip(_OPERANDS, (query, key, value), strict=True):
        _check_layout(name, tensor)
    if key_mask is not None:
        _check_layout("key_mask", key_mask)


def _check_rank(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 4:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must be [batch, heads, tokens, head_dim]"
        )


def _check_head_dim(query: Tensor) -> None:
    head_dim = query.shape[3]
    if isinstance(head_dim, int) and head_dim == 0:
        raise ValueError("head_dim is 0; it must be at least 1")


def _check_tensors(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, prefix: Any, suffix: Any
) -> None:
    """Raises ValueError; compares plain ints only, so that no symbol gets a guard."""
    _check_layouts(query, key, value, key_mask)
    for name, tensor in zip(_OPERANDS, (query, key, value), strict=True):
        _check_rank(name, tensor)
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on "
                f"{query.device}; dtype and device must be the same: convert one of them"
            )
    if not query.dtype.is_floating_point:
        raise ValueError(f"query is {query.dtype}; it must be a floating-point type")
    batch, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    wanted = (batch, kv_heads, tokens, head_dim)
    for name, tensor in (("key", key), ("value", value)):
        if any(map(_differ, tensor.shape, wanted)):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} for a query of {tuple(query.shape)}; it "
                f"must be {wanted}"
            )
    _check_head_dim(query)
    known_heads = isinstance(heads, int) and isinstance(kv_heads, int)
    if known_heads and (heads % kv_heads if kv_heads else heads):
        raise ValueError(f"query has {heads} heads and key {kv_heads}; key's must divide query's")
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool or key_mask.device != query.device:
        raise ValueError(
            f"key_mask is {key_mask.dtype} on {key_mask.device}; it must be torch.bool on "
            f"{query.device}, True where a global key is visible"
        )
    if key_mask.ndim != 2 or any(map(_differ, key_mask.shape, (batch, prefix + suffix))):
        raise ValueError(
            f"key_mask has shape {tuple(key_mask.shape)}; it must be [batch, prefix + suffix] = "
            f"[{batch}, {prefix + suffix}]: it covers the global tokens only"
        )


def _check_results(
    query: Tensor,
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
) -> None:
    """Raises ValueError unless the backward's other inputs fit the query."""
    accurate = _logsumexp_dtype(query)
    expected = [
        ("grad_output", grad_output, query.shape, query.dtype),
        ("output", output, query.shape, query.dtype),
        ("logsumexp", logsumexp, query.shape[:3], accurate),
    ]
    if grad_logsumexp is not None:
        expected.append(("grad_logsumexp", grad_logsumexp, query.shape[:3], accurate))
    _check_like(expected, query.device)


def _check_tangents(
    operands: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor, Tensor, Tensor],
    logsumexp: Tensor,
) -> None:
    """Raises ValueError unless the tangents and logsumexp fit the operands."""
    query = operands[0]
    expected = [
        (f"tangent_{name}", tangent, operand.shape, operand.dtype)
        for name, tangent, operand in zip(_OPERANDS, tangents, operands, strict=True)
    ]
    expected.append(("logsumexp", logsumexp, query.shape[:3], _logsumexp_dtype(query)))
    _check_like(expected, query.device)


def _check_like(
    expected: Sequence[tuple[str, Tensor, Sequence[Any], torch.dtype]], device: torch.device
) -> None:
    for name, tensor, shape, dtype in expected:
        _check_layout(name, tensor)
        fits = tensor.ndim == len(shape) and not any(map(_differ, tensor.shape, shape))
        if not fits or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; it must be "
                f"{dtype} {tuple(shape)} on {device}"
            )


def _differ(size: Any, wanted: Any) -> bool:
    """Whether two sizes are known to differ."""
    return isinstance(size, int) and isinstance(wanted, int) and size != wanted


def _logsumexp_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _empty_outputs(query: Tensor, output_order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Output, dense in memory with its dimensions in this order, outermost first; logsumexp."""
    if sorted(output_order) != [0, 1, 2, 3]:
        raise ValueError(
            f"output_order {list(output_order)} must be a permutation of 0, 1, 2, 3: the "
            "dimensions of the output, outermost in memory first"
        )
    inverse = [output_order.index(dim) for dim in range(4)]
    output = query.new_empty([query.shape[dim] for dim in output_order]).permute(inverse)
    return output, query.new_empty(query.shape[:3], dtype=_logsumexp_dtype(query))


# How PyTorch sees the ops ------------------------------------------------------------------------


def _forward_fake(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    grid,
    window,
    stride,
    dilation,
    causal,
    prefix,
    suffix,
    key_mask,
    scale,
    output_order,
    provider="",
):
    geometry = (grid, window, stride, dilation, causal, prefix, suffix)
    _check_tensors(query, key, value, key_mask, prefix, suffix)
    _check_geometry_if_known(query, geometry)
    return _empty_outputs(query, output_order)


def _backward_fake(  # type: ignore[no-untyped-def]
    grad_output,
    grad_logsumexp,
    query,
    key,
    value,
    output,
    logsumexp,
    grid,
    window,
    stride,
    dilation,
    causal,
    prefix,
    suffix,
    key_mask,
    scale,
    provider="",
):
    _check_tensors(query, key, value, key_mask, prefix, suffix)
    _check_results(query, grad_output, grad_logsumexp, output, logsumexp)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _tangent_fake(  # type: ignore[no-untyped-def]
    tangent_query,
    tangent_key,
    tangent_value,
    query,
    key,
    value,
    logsumexp,
    grid,
    window,
    stride,
    dilation,
    causal,
    prefix,
    suffix,
    key_mask,
    scale,
    output_order,
):
    _check_tensors(query, key, value, key_mask, prefix, suffix)
    _check_tangents((query, key, value), (tangent_query, tangent_key, tangent_value), logsumexp)
    return _empty_outputs(query, output_order)


def _check_geometry_if_known(query: Tensor, geometry: tuple[Any, ...]) -> None:
    grid, window, stride, dilation, _, prefix, suffix = geometry
    sizes = [query.shape[2], *grid, *window, *stride, *dilation, prefix, suffix]
    if all(isinstance(size, int) for size in sizes):
        _neighborhood(geometry, query.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *geometry, key_mask, scale, _, provider = inputs
    ctx.save_for_backward(query, key, value, *output, key_mask)
    ctx.rest = (geometry, scale, provider)
    # An unused logsumexp then costs nothing.
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> Any:
    nothing = (None,) * 11
    if grad_output is None and grad_logsumexp is None:
        return (None, None, None, *nothing)
    query, key, value, output, logsumexp, key_mask = ctx.saved_tensors
    geometry, scale, provider = ctx.rest
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
        *geometry,
        key_mask,
        scale,
        provider,
    )
    needed = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)]
    return (*needed, *nothing)


def _forward_gradient(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
    query, key, value, logsumexp, key_mask = ctx.saved_tensors
    geometry, scale, _ = ctx.rest
    moving = [
        torch.zeros_like(operand) if tangent is None else tangent
        for operand, tangent in zip((query, key, value), tangents[:3], strict=True)
    ]
    pair: tuple[Tensor, Tensor] = _TANGENT(
        *moving, query, key, value, logsumexp, *geometry, key_mask, scale, ctx.output_order
    )
    return pair


def _second_gradient(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        "gna::attention can be differentiated once; for second derivatives, in forward or in "
        "reverse mode, use the dense attention"
    )


class _Attention(torch.autograd.function._SingleLevelFunction):
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


class _Derivative(torch.autograd.function._SingleLevelFunction):
    """How autograd sees the op's derivatives: as not differentiable. First argument: which."""

    @staticmethod
    def forward(ctx: Any, op: Any, *args: Any) -> tuple[Tensor, ...]:
        *inputs, keyset = args
        return _below_autograd(op, keyset, inputs)

    backward = staticmethod(_second_gradient)
    jvp = staticmethod(_second_gradient)


def _below_autograd(op: Any, keyset: Any, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Calls what lies below autograd: the real implementation, or the next functorch transform."""
    below = keyset & torch._C._after_autograd_keyset
    with torch._C._AutoDispatchBelowAutograd():
        if not torch._C._are_functorch_transforms_active():
            return tuple(op.redispatch(below, *args))
        # An autograd function switches derivatives off, which would end the transforms around it.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return tuple(op.redispatch(below, *args))


def _apply(function: Any, *args: Any) -> Any:
    """Calls an autograd function from within a kernel, where one transform is at work at most."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return function.apply(*args)


def _attention_autograd(keyset: Any, *args: Any) -> Any:
    # Also where no gradient is wanted: whether an operand has a tangent is not told from here.
    # The dispatcher leaves out an argument that has its default.
    defaults = ("",) if len(args) < len(_FORWARD._schema.arguments) else ()
    return _apply(_Attention, *args, *defaults, keyset)


def _derivative_autograd(op: Any) -> Callable[..., Any]:
    def kernel(keyset: Any, *args: Any) -> Any:
        return _apply(_Derivative, op, *args, keyset)

    return kernel


def _autocast(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Casts query, key and value as `scaled_dot_product_attention` does under autocast."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device)

        def cast(tensor: Tensor) -> Tensor:
            casts = (
                tensor.is_floating_point()
                and tensor.dtype != torch.float64
                and tensor.device.type == device
            )
            return tensor.to(dtype) if casts else tensor

        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS[device]):
            result: tuple[Tensor, Tensor] = _FORWARD(cast(query), cast(key), cast(value), *rest)
            return result

    return kernel


def _vmap_rule(op: Any) -> Callable[..., Any]:
    """Folds the mapped dimension into the batch, which every tensor of both ops has first."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        def fold(arg: Any, dim: Any) -> Any:
            if not isinstance(arg, Tensor):
                return arg
            if dim is None:
                mapped = arg.unsqueeze(0).expand(info.batch_size, *arg.shape)
            else:
                mapped = arg.movedim(dim, 0)
            return mapped.flatten(0, 1)

        folded = [fold(arg, dim) for arg, dim in zip(args, in_dims, strict=True)]
        results = op(*folded)
        batch = next(arg for arg in folded if isinstance(arg, Tensor)).shape[0] // info.batch_size
        unfolded = tuple(result.unflatten(0, (info.batch_size, batch)) for result in results)
        return unfolded, (0,) * len(unfolded)

    return rule


_library.impl(_FORWARD_NAME, _forward, "CompositeExplicitAutograd")
_library.impl(_BACKWARD_NAME, _backward, "CompositeExplicitAutograd")
_library.impl(_TANGENT_NAME, _tangent, "CompositeExplicitAutograd")
torch.library.register_fake(_FORWARD_NAME, _forward_fake, lib=_library)
torch.library.register_fake(_BACKWARD_NAME, _backward_fake, lib=_library)
torch.library.register_fake(_TANGENT_NAME, _tangent_fake, lib=_library)
_library.impl(_FORWARD_NAME, _attention_autograd, "Autograd", with_keyset=True)
for _name, _op in ((_BACKWARD_NAME, _BACKWARD), (_TANGENT_NAME, _TANGENT)):
    _library.impl(_name, _derivative_autograd(_op), "Autograd", with_keyset=True)
torch.library.register_vmap(_FORWARD_NAME, _vmap_rule(_FORWARD), lib=_library)
torch.library.register_vmap(_BACKWARD_NAME, _vmap_rule(_BACKWARD), lib=_library)
torch.library.register_vmap(_TANGENT_NAME, _vmap_rule(_TANGENT), lib=_library)
_library.impl(_FORWARD_NAME, _autocast("cpu"), "AutocastCPU")
_library.impl(_FORWARD_NAME, _autocast("cuda"), "AutocastCUDA")
flops.register()
