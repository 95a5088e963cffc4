"""Masks that hide nothing: some libraries write them out where none is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gna_compile.graph.nodes import tensor_of
from gna_compile.graph.sites.find import Site
from gna_compile.graph.symbols import Size
from gna_compile.graph.tokens.constants import fixed_values


def without_idle_masks(sites: Sequence[Site]) -> list[Site]:
    """The sites, without the masks that are known to show every key to every query."""
    known: dict[object, torch.Tensor | None] = {}
    result = []
    for site in sites:
        if site.mask is not None:
            if site.mask not in known:
                known[site.mask] = fixed_values(site.mask)
            values = known[site.mask]
            if (
                values is not None
                and _hides_nothing(values, site.mask_form)
                and _fits(values, site)
            ):
                site = replace(site, mask=None, mask_form="")
        result.append(site)
    return result


def _hides_nothing(values: torch.Tensor, form: str) -> bool:
    if form == "sdpa" and values.dtype == torch.bool:
        return bool(values.all())
    # A mask of zeros that is added does nothing; where scores are filled, True hides.
    return form in ("sdpa", "added", "filled") and not bool(values.any())


def _fits(values: torch.Tensor, site: Site) -> bool:
    """Whether the scores are no larger with the mask than without it."""
    query = None if site.query is None else tensor_of(site.query)
    if query is None or values.ndim > query.ndim:
        return False
    scores: tuple[Size, ...] = (*query.shape[:-1], site.key_tokens)
    pairs = zip(values.shape, scores[len(scores) - values.ndim :], strict=True)
    return all(n == 1 or (isinstance(size, int) and n == size) for n, size in pairs)
