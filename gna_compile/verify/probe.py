"""A copy of a graph in which tokens do not mix, to see which rows of its attentions an input moves.

Every attention gives each token its own query, so that a token of one layer depends on the same token
of the layer before, and on no other. Changing an input in one place then changes, in all
attentions at once, the rows that come from there. `verify_layouts.py` draws the conclusions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from gna_compile import _torch
from gna_compile.graph.functorch import samples_as_batch
from gna_compile.graph.mutation import shares_memory, written_by
from gna_compile.graph.rewrite import SizeNodes, copy_with_sites, erase_unused, memory_order
from gna_compile.graph.sites.find import Site
from gna_compile.graph.symbols import same_shape
from gna_compile.graph.tokens.layouts import Layout

OPERANDS = ("queries", "keys", "values")
Operands = tuple[Tensor, Tensor, Tensor]
Claim = tuple[tuple[int, ...], int]
"""A grid and how many tokens lie before it, in numbers."""

_COMPONENTS = 16


@dataclass(frozen=True)
class Call:
    """One call of an attention.

    Attributes:
        rows: for queries, keys and values, what stands for each row: [batch, tokens, components].
        claims: the layouts that are claimed for it.
    """

    rows: Operands
    claims: tuple[Claim, ...]


class Probe:
    """The copy.

    Args:
        gm: Dynamo's graph; it stays as it is. Its parameters are shared.
        claims: the attentions to watch, each with the layouts that are claimed for it.
        mixing: further attentions.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        claims: Sequence[tuple[Site, Sequence[Layout]]],
        mixing: Iterable[Site] = (),
    ) -> None:
        watched = [site for site, _ in claims]
        others = [site for site in mixing if site not in watched and _is_separable(site)]
        self._watched = len(watched)
        self.names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        self._twin, copies = copy_with_sites(gm, [*watched, *others])
        sizes: dict[fx.Graph, SizeNodes] = {}
        for place, (site, (_, layouts)) in enumerate(zip(copies, claims, strict=False)):
            graph = site.node.graph
            known = sizes.setdefault(graph, SizeNodes(graph))
            claimed = [
                ([known.node_for(size) for size in grid], known.node_for(start))
                for layout in layouts
                for start, grid in layout.placed
                if isinstance(grid, tuple)
            ]
            operands = (site.query, site.key, site.value)
            with graph.inserting_before(site.node):
                graph.call_function(observe, (place, *operands, site.key_transposed, claimed))
        for site in copies:
            _separate(site)
        for owner in dict.fromkeys(site.owner for site in copies):
            owner.graph.lint()
            owner.recompile()
        self._written = _written_inputs(gm)
        self._constants = [
            (module, name, tensor)
            for module in self._twin.modules()
            for name, tensor in (*module.named_buffers(recurse=False), *_plain_tensors(module))
        ]

    def run(self, inputs: Sequence[Any]) -> list[list[Call]]:
        """The calls of each watched attention, from a run on copies of what the graph may change.

        Random numbers are those of the caller, and stay there.
        """
        copies = [
            _copy(value, index in self._written or not isinstance(value, torch.nn.Parameter))
            for index, value in enumerate(inputs)
        ]
        for module, name, tensor in self._constants:
            setattr(module, name, tensor.detach().clone())
        seen: dict[int, list[Call]] = {}
        before = getattr(_thread, "seen", None)
        _thread.seen = seen
        try:
            with torch.no_grad(), _torch.random_numbers_kept():
                self._twin.forward(*copies)
        finally:
            _thread.seen = before
            for module, name, tensor in self._constants:
                setattr(module, name, tensor)
        return [seen.get(place, []) for place in range(self._watched)]


_thread = threading.local()


def observe(
    place: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_transposed: bool,
    claims: Sequence[tuple[Sequence[int], int]],
) -> None:
    """Notes one call of an attention; a node of the copy."""
    seen = getattr(_thread, "seen", None)
    if seen is None:
        return
    query, key, value = samples_as_batch((query, key, value))
    if key_transposed:
        key = key.transpose(-1, -2)
    rows = (_rows(query, 0), _rows(key, 1), _rows(value, 2))
    claimed = tuple((tuple(map(int, grid)), int(prefix)) for grid, prefix in claims)
    seen.setdefault(place, []).append(Call(rows, claimed))


def own_query(query: Tensor, order: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The queries in place of what attention gives; a node of the copy.

    Args:
        order: dimensions of the result from outermost to innermost in memory.
    """
    copy = query.to(dtype).permute(*order).clone(memory_format=torch.contiguous_format)
    return copy.permute(*(order.index(dim) for dim in range(len(order))))


def _is_separable(site: Site) -> bool:
    """Whether its output can be replaced by its queries, token by token."""
    if site.query is None:
        return False
    query, out = (node.meta["example_value"] for node in (site.query, site.node))
    return same_shape(query.shape, out.shape)


def _separate(site: Site) -> None:
    original = site.node.meta["example_value"]
    arguments = (site.query, memory_order(original), original.dtype)
    with site.node.graph.inserting_before(site.node):
        alone = site.node.graph.call_function(own_query, arguments)
    alone.meta = dict(site.node.meta)
    site.node.replace_all_uses_with(alone)
    erase_unused(site.node)


def _written_inputs(gm: fx.GraphModule) -> set[int]:
    """Positions of the inputs that a graph changes in place."""
    written = {target for node in gm.graph.nodes for target in written_by(node)}
    placeholders = gm.graph.find_nodes(op="placeholder")
    return {
        index
        for index, node in enumerate(placeholders)
        if any(shares_memory(target, node) for target in written)
    }


def _plain_tensors(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]


def _copy(value: Any, is_changed: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if is_changed else value.detach()


def _rows(operand: Tensor, place: int) -> Tensor:
    """A few sums with random weights of each row: rows that differ have others, on the host."""
    if operand.ndim == 3:
        operand = operand.unsqueeze(1)
    operand = operand.flatten(0, -4)
    heads, size = operand.shape[1], operand.shape[-1]
    # Not of PyTorch: inside `vmap` it may forbid random numbers.
    numbers = np.random.default_rng(place).standard_normal((heads, size, _COMPONENTS))
    weights = torch.from_numpy(numbers).float().to(operand.device)
    with torch.autocast(operand.device.type, enabled=False):
        total = operand[:, 0].float() @ weights[0]
        for head in range(1, heads):
            total += operand[:, head].float() @ weights[head]
    return total.cpu()
