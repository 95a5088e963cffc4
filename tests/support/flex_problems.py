"""Random problems for FlexAttention: one grid, any attention pattern, and many that share kernels."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import oracle
import pattern_oracle
import patterns
import torch
from problems import error
from torch import Tensor

from gna_compile import ops
from gna_compile.geometry import (
    AttentionPattern,
    GlobalTokens,
    GridTokens,
    HeadGroup,
    Link,
    canonical,
    encode,
)
from gna_compile.geometry.segments import Segment
from gna_compile.providers.flex.columns import Column, Links
from gna_compile.providers.flex.lists import TileLists
from gna_compile.providers.flex.tiles import TILE, Layout, Rows, lay_out


def check_random_problem(
    seed: int, device: str, dtype: torch.dtype, longest: dict[int, int], tolerance: float = 2e-5
) -> None:
    """Forward, logsumexp and backward of provider "flex" against the oracle."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rank = rng.choice([1, 2, 3])
    geometry: dict[str, Any] = {n: [] for n in ("grid", "window", "stride", "dilation", "causal")}
    for _ in range(rank):
        length = rng.randint(1, longest[rank])
        dilation = rng.choice([1, 1, rng.randint(1, min(length, 4))])
        window = rng.choice([rng.randint(1, length // dilation), length // dilation])
        stride = rng.choice([1, rng.randint(1, window), window])
        for name, drawn in zip(
            geometry, (length, window, stride, dilation, rng.random() < 0.25), strict=True
        ):
            geometry[name].append(drawn)
    prefix, suffix = (rng.choice([0, 0, rng.randint(0, 150)]) for _ in range(2))
    visible = oracle.mask(**geometry, prefix=prefix, suffix=suffix).to(device)
    tokens, batch, kv_heads = len(visible), rng.choice([1, 2]), rng.choice([1, 2])
    heads, head_dim = kv_heads * rng.choice([1, 1, 2, 3]), rng.choice([16, 32, 40, 64, 96, 128])

    def values(heads: int) -> Tensor:
        if rng.random() < 0.5:
            return torch.randn(batch, tokens, heads, head_dim).to(device, dtype).transpose(1, 2)
        return torch.randn(batch, heads, tokens, head_dim).to(device, dtype)

    inputs = [values(count).requires_grad_() for count in (heads, kv_heads, kv_heads)]
    key_mask = None
    if rng.random() < 0.4:
        key_mask = (torch.rand(batch, prefix + suffix) < 0.5).to(device)
    scale = rng.choice([None, 0.3, -0.5, 0.0])
    results = ops.neighborhood_attention(
        *inputs,
        **geometry,
        prefix=prefix,
        suffix=suffix,
        key_mask=key_mask,
        scale=scale,
        return_logsumexp=True,
        provider="flex",
    )
    wanted = oracle.attention(
        *inputs, visible=visible, key_mask=key_mask, scale=scale, prefix=prefix
    )
    assert error(results[0], wanted[0]) < tolerance, geometry
    assert error(results[1], wanted[1]) < max(2e-5, tolerance / 10), geometry
    count = rng.choice([1, 2])
    upstream = [values(heads), torch.randn(batch, heads, tokens, device=device)][:count]
    grads = torch.autograd.grad(results[:count], inputs, upstream)
    expected = torch.autograd.grad(wanted[:count], inputs, [x.double() for x in upstream])
    for grad, other in zip(grads, expected, strict=True):
        assert error(grad, other.double()) < 3 * tolerance, geometry


# Any attention pattern ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a problem has beside its pattern and its values.

    Args:
        dtype: of query, key and value.
        batch: batch size.
        shared: query heads of a key head.
        head_dim: elements of a head.
        scale: of the logits.
        is_masked: whether there is a key mask.
        with_logsumexp: whether a gradient flows into the logsumexp.
        transposed: whether a token's heads lie side by side in memory.
    """

    dtype: torch.dtype
    batch: int
    shared: int
    head_dim: int
    scale: float
    is_masked: bool
    with_logsumexp: bool
    transposed: bool

    @classmethod
    def draw(cls, rng: random.Random, dtype: torch.dtype) -> Setting:
        return cls(
            dtype=dtype,
            batch=rng.choice([1, 2]),
            shared=rng.choice([1, 1, 2, 3]),
            head_dim=rng.choice([16, 32, 40, 64]),
            scale=rng.choice([0.3, 0.1, -0.5]),
            is_masked=rng.random() < 0.5,
            with_logsumexp=rng.random() < 0.5,
            transposed=rng.random() < 0.5,
        )


@dataclass
class Worst:
    """The largest errors so far, relative to the largest value around 1."""

    problems: int = 0
    output: float = 0.0
    logsumexp: float = 0.0
    gradient: float = 0.0


def check_random_pattern(
    seed: int,
    device: str,
    dtype: torch.dtype,
    longest: int,
    most_tokens: int,
    tolerance: float = 2e-5,
    one_group: bool = False,
) -> None:
    """A random pattern through the op, with all its head groups or one of them, of two heads."""
    rng = random.Random(seed)
    pattern = patterns.draw(rng.getrandbits(40), longest, most_tokens)
    if one_group:
        pattern = pattern.of_group(replace(rng.choice(pattern.head_groups), heads=2))
    check_pattern(pattern, Setting.draw(rng, dtype), seed, device, tolerance, Worst())


def check_pattern(
    pattern: AttentionPattern,
    setting: Setting,
    seed: int,
    device: str,
    tolerance: float,
    worst: Worst,
) -> None:
    """Forward, logsumexp and backward of provider "flex" against the oracle in float64.

    Args:
        pattern: each of its heads is a key head, which `shared` query heads share.
        setting: what else there is.
        seed: of the values.
        device: to run on.
        tolerance: of the output; three times as much is that of gradients.
        worst: where the errors are added.
    """
    torch.manual_seed(seed)
    kv_heads, batch = pattern.heads, setting.batch
    groups = [replace(group, heads=group.heads * setting.shared) for group in pattern.head_groups]
    pattern = replace(pattern, head_groups=tuple(groups))

    def values(heads: int, tokens: int) -> Tensor:
        if setting.transposed:
            drawn = torch.randn(batch, tokens, heads, setting.head_dim).transpose(1, 2)
        else:
            drawn = torch.randn(batch, heads, tokens, setting.head_dim)
        return drawn.to(device, setting.dtype)

    sizes = ((pattern.heads, pattern.query_tokens), *[(kv_heads, pattern.key_tokens)] * 2)
    inputs = [values(*size).requires_grad_() for size in sizes]
    key_mask = None
    if setting.is_masked:
        key_mask = (torch.rand(batch, pattern.global_keys) < 0.5).to(device)
    results = torch.ops.gna.attention.v2(
        *inputs, encode(pattern), key_mask, setting.scale, [0, 1, 2, 3], "flex"
    )
    seen = pattern_oracle.visible(pattern)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    mask = None if key_mask is None else key_mask.cpu()
    wanted = pattern_oracle.attention(
        *exact, pattern=pattern, key_mask=mask, scale=setting.scale, seen=seen
    )
    upstream = [values(*sizes[0]), torch.randn(results[1].shape, device=device)]
    upstream = upstream[: 1 + setting.with_logsumexp]
    grads = torch.autograd.grad(results[: len(upstream)], inputs, upstream)
    expected = torch.autograd.grad(
        wanted[: len(upstream)], exact, [x.cpu().double() for x in upstream]
    )
    name = f"seed {seed}: {pattern!r}, {setting}"
    output, logsumexp = (error(a.cpu(), b) for a, b in zip(results, wanted, strict=True))
    gradient = max(error(a.cpu(), b.double()) for a, b in zip(grads, expected, strict=True))
    assert output < tolerance, (output, name)
    assert logsumexp < max(2e-5, tolerance / 10), (logsumexp, name)
    assert gradient < 3 * tolerance, (gradient, name)
    seen = seen.expand(batch, -1, -1, -1).clone()
    if mask is not None:
        seen[..., pattern_oracle.global_keys(pattern)] &= mask[:, None, None]
    blind = ~seen.any(-1).to(device)
    unseen = ~seen.any(-2).unflatten(1, (kv_heads, -1)).any(2).to(device)
    assert (results[0][blind] == 0).all() and results[1][blind].isneginf().all(), name
    assert (grads[0][blind] == 0).all(), name
    assert all((grad[unseen] == 0).all() for grad in grads[1:]), name
    worst.problems += 1
    worst.output = max(worst.output, output)
    worst.logsumexp = max(worst.logsumexp, logsumexp)
    worst.gradient = max(worst.gradient, gradient)


# Many problems that share a kernel ---------------------------------------------------------------

# Sizes that they all have: tokens of a sequence, global keys, tiles of a sequence, parts.
TOKENS, GLOBALS, TILES, PARTS = 256, 48, 10, 16


def filled(pattern: AttentionPattern, rng: random.Random) -> AttentionPattern:
    """The pattern with more tokens off its windows, so that all have as many tokens and global keys."""
    count = sum(segment.tokens for segment in pattern.keys if isinstance(segment, GlobalTokens))
    more_keys: tuple[Segment, ...] = (
        GlobalTokens(GLOBALS - count),
        GridTokens((TOKENS - GLOBALS - pattern.key_tokens + count,)),
    )
    more_queries: tuple[Segment, ...] = more_keys
    windows = [*pattern.head_groups[0].windows, None]
    if pattern.queries != pattern.keys:
        more_queries = (GlobalTokens(TOKENS - pattern.query_tokens),)
        windows.pop()

    def links(count: int) -> list[Link]:
        return [rng.choice([Link.FULL, Link.FULL, Link.NONE]) for _ in range(count)]

    if rng.random() < 0.3:

        def links(count: int) -> list[Link]:
            return [Link.FULL] * count

    keys = (*pattern.keys, *more_keys)
    rows = [(*row, *links(len(more_keys))) for row in pattern.links]
    rows += [tuple(links(len(keys))) for _ in more_queries]
    group = HeadGroup(pattern.heads, tuple(windows))
    return AttentionPattern((*pattern.queries, *more_queries), keys, tuple(rows), (group,), True)


def padded(pattern: AttentionPattern, hides_keys: bool = False) -> Layout:
    """The layout with more padding, so that the tables of all of these patterns have one shape."""
    layout = lay_out(pattern, hides_keys)

    def rows(table: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(table, (0, TILES * TILE - len(table)), value=value)

    def sequence(old: Rows) -> Rows:
        return Rows(rows(old.order, -1), old.rows)

    def lists(old: TileLists) -> TileLists:
        tables = []
        for table in (old.masked_counts, old.masked, old.whole_counts, old.whole):
            wide = [0, TILES - table.shape[1]] if table.ndim == 2 else []
            tables.append(torch.nn.functional.pad(table, (*wide, 0, TILES - len(table))))
        return TileLists(*tables)

    links: Tensor | Links
    if isinstance(layout.links, Links):
        table = torch.zeros(PARTS, PARTS, dtype=torch.int32)
        table[: layout.links.table.shape[0], : layout.links.table.shape[1]] = layout.links.table
        key_part = layout.links.key_part.masked_fill(layout.keys.order < 0, PARTS - 1)
        links = Links(rows(layout.links.query_part, 0), rows(key_part, PARTS - 1), table)
    else:
        links = rows(layout.links, 0)
    queries = sequence(layout.queries)
    return Layout(
        queries,
        queries if layout.keys is layout.queries else sequence(layout.keys),
        lists(layout.key_tiles),
        lists(layout.query_tiles),
        tuple(Column(rows(at, -1), rows(a, 0), rows(b, 0)) for at, a, b in layout.columns),
        links,
        rows(layout.global_key, -1),
    )


@cache
def families(count: int, seeds: int = 3000) -> list[list[AttentionPattern]]:
    """Patterns with equal mask structures, the `count` largest of such families among `seeds` draws."""
    found: dict[tuple[int, str], list[AttentionPattern]] = defaultdict(list)
    for seed in range(seeds):
        rng = random.Random(seed)
        pattern = patterns.draw(rng.getrandbits(40), 12, 200)
        if rng.random() < 0.9 and not any(Link.WINDOW in row for row in pattern.links):
            continue
        group = replace(rng.choice(pattern.head_groups), heads=2)
        pattern = canonical(filled(pattern.of_group(group), rng))
        layout = lay_out(pattern)
        rows = max(len(layout.queries.order), len(layout.keys.order))
        if rows > TILES * TILE or pattern.neighborhood is not None:
            continue
        if isinstance(layout.links, Links):
            kind = "links"
        else:
            kind = "shown" if layout.links.any() else "columns"
        found[len(layout.columns), kind].append(pattern)
    return sorted(found.values(), key=len, reverse=True)[:count]
