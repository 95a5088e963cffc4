"""How autocast and vmap see the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gna_compile import _torch
from gna_compile.ops.implementations import AUTOCAST_KEYS
from gna_compile.ops.schema import FORWARD


def autocast(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
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

        with _torch.ExcludeDispatchKeyGuard(AUTOCAST_KEYS[device]):
            result: tuple[Tensor, Tensor] = FORWARD(cast(query), cast(key), cast(value), *rest)
            return result

    return kernel


def vmap_rule(op: Any) -> Callable[..., Any]:
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
