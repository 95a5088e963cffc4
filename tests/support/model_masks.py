"""One policy for all model classes, and the masks that it means."""

from __future__ import annotations

from typing import Any

import torch
from masked_model import layout_mask

from gna_compile.report.explain import Explanation

POLICY: dict[str, Any] = {
    "version": 1,
    "min_tokens": 60,
    "min_speedup": 0,
    "key_mask": "global_tokens",
    "rules": [{"window": "1/2", "stride": 2}],
}


def masks_of(explanation: Explanation, model: torch.nn.Module | None = None) -> dict[str, Any]:
    """The masks of the claimed layouts, which `test_decisions` holds to the true ones."""
    return {
        full_name(row.layer, model): layout_mask(
            row.layout, sizes_of(row.window), sizes_of(row.stride)
        )
        for row in explanation.rows
        if row.decision == "gna"
    }


def full_name(layer: str, model: torch.nn.Module | None) -> str:
    """The name in the whole model; after a graph break a layer's name starts further inside."""
    names = [name for name, _ in model.named_modules()] if model is not None else []
    inside = [name for name in names if name.endswith(f".{layer}")]
    return inside[0] if layer not in names and len(inside) == 1 else layer


def sizes_of(text: str) -> list[list[int] | None]:
    """What a row says of each grid: `4x5 + full`."""
    return [
        None if part == "full" else [int(n) for n in part.split("x")] for part in text.split(" + ")
    ]
