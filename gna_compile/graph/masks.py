"""Masks in a plainer form: those that hide nothing are left out, those of pairs are one of keys.

Some libraries write masks out where none is needed. Others hide padded tokens as queries, too:

    mask[b, 0, i, j] = shown[b, i] and shown[b, j]

The keys that a site's query sees are then those of `shown`, or none at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from gna_compile.graph.mutation import shares_memory, written_by
from gna_compile.graph.nodes import operator_name, tensor_of
from gna_compile.graph.sites.find import Site
from gna_compile.graph.symbols import Size, is_known
from gna_compile.graph.tokens.constants import fixed_values


def with_plain_masks(sites: Sequence[Site]) -> list[Site]:
    """The sites, without masks that show every key to every query, and with key masks for pairs."""
    known: dict[fx.Node, torch.Tensor | None] = {}
    result = []
    for site in sites:
        mask = site.mask
        if mask is not None:
            if mask not in known:
                known[mask] = fixed_values(mask)
            values = known[mask]
            pair = _of_keys_and_queries(mask, site)
            if (
                values is not None
                and _hides_nothing(values, site.mask_form)
                and _fits(values, site)
            ):
                site = replace(site, mask=None, mask_form="")
            elif pair is not None:
                site = replace(site, mask=pair[0], query_mask=pair[1])
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


def _of_keys_and_queries(mask: fx.Node, site: Site) -> tuple[fx.Node, fx.Node] | None:
    """The masks [batch, 1, 1, keys] and [batch, 1, queries, 1] that one of pairs is made of, if it is."""
    tensor, query = tensor_of(mask), None if site.query is None else tensor_of(site.query)
    if tensor is None or query is None or (tensor.ndim, query.ndim) != (4, 4):
        return None
    is_product = operator_name(mask) in ("mul", "and", "bitwise_and", "logical_and")
    if site.mask_form != "sdpa" or not is_product or len(mask.args) != 2 or mask.kwargs:
        return None
    views = {_form(view): view for view in mask.args}
    keys, queries = views.get("keys"), views.get("queries")
    if not isinstance(keys, fx.Node) or not isinstance(queries, fx.Node):
        return None
    root = _inserted_from(keys)
    if root is None or root is not _inserted_from(queries):
        return None
    if any(map(_is_written, (root, mask))):
        return None
    return keys, queries


def _form(view: Any) -> str:
    """Which of a mask's last two dimensions a tensor [batch, 1, .., ..] has."""
    tensor = tensor_of(view)
    if tensor is None or tensor.dtype != torch.bool or tensor.ndim != 4:
        return ""
    _, one, rows, columns = (is_known(size == 1) for size in tensor.shape)
    return {(True, True, False): "keys", (True, False, True): "queries"}.get(
        (one, rows, columns), ""
    )


def _inserted_from(view: Any) -> fx.Node | None:
    """The tensor [batch, tokens] into whose shape dimensions of size 1 were put."""
    while isinstance(view, fx.Node) and (tensor := tensor_of(view)) is not None:
        if tensor.ndim == 2:
            return view
        name, args = operator_name(view), view.args
        if name == "getitem":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if not all(item is None or item == slice(None) for item in index):
                return None
        elif name != "unsqueeze":
            return None
        view = args[0]
    return None


def _is_written(node: fx.Node) -> bool:
    """Whether the graph writes to the memory of a tensor."""
    return any(
        shares_memory(target, node) for user in node.graph.nodes for target in written_by(user)
    )
