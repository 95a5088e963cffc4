"""The op: `torch.ops.gna.attention.v2`, its derivatives, and how PyTorch sees them.

Importing this registers them, with `torch.library.Library`: about half of `custom_op`'s cost per
call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gna_compile.geometry import write_grid
from gna_compile.ops import derivatives, flops, implementations, transforms
from gna_compile.ops.checks import check_head_dim, check_layouts, check_rank
from gna_compile.ops.schema import BACKWARD, FORWARD, LIBRARY, TANGENT
from gna_compile.providers import Inputs

__all__ = ["neighborhood_attention"]


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
    """Generalized neighborhood attention over a grid of tokens, with global tokens around it.

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
    check_layouts(Inputs(query, key, value, key_mask, 0.0))
    check_rank("query", query)
    check_head_dim(query)
    rank = len(grid)
    # A transposed [B, N, H, D] stays one, so that a model's transpose back costs nothing.
    order = [0, 2, 1, 3] if query.stride(1) < query.stride(2) else [0, 1, 2, 3]
    output, logsumexp = FORWARD(
        query,
        key,
        value,
        write_grid(
            grid,
            window,
            [1] * rank if stride is None else stride,
            [1] * rank if dilation is None else dilation,
            [False] * rank if causal is None else causal,
            prefix,
            suffix,
            query.shape[1],
        ),
        key_mask,
        query.shape[3] ** -0.5 if scale is None else scale,
        order,
        provider,
    )
    return (output, logsumexp) if return_logsumexp else output


def _register() -> None:
    parts = (
        (FORWARD, implementations.forward, implementations.forward_fake, derivatives.attention),
        (
            BACKWARD,
            implementations.backward,
            implementations.backward_fake,
            derivatives.not_differentiable(BACKWARD),
        ),
        (
            TANGENT,
            implementations.tangent,
            implementations.tangent_fake,
            derivatives.not_differentiable(TANGENT),
        ),
    )
    for op, real, fake, autograd in parts:
        LIBRARY.impl(op.name(), real, "CompositeExplicitAutograd")
        LIBRARY.impl(op.name(), autograd, "Autograd", with_keyset=True)
        torch.library.register_fake(op.name(), fake, lib=LIBRARY)
        torch.library.register_vmap(op.name(), transforms.vmap_rule(op), lib=LIBRARY)
    LIBRARY.impl(FORWARD.name(), transforms.autocast("cpu"), "AutocastCPU")
    LIBRARY.impl(FORWARD.name(), transforms.autocast("cuda"), "AutocastCUDA")
    flops.register()


_register()
