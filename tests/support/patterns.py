"""Random attention patterns: every kind of segment, link, box and head group."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from gna_compile.geometry import (
    AttentionPattern,
    GeometryError,
    GlobalTokens,
    GridTokens,
    HeadGroup,
    Link,
    Segment,
    Window,
)


def draw(seed: int, longest: int = 7, most_tokens: int = 120) -> AttentionPattern:
    """A valid pattern; the same for the same seed."""
    generator = random.Random(seed)
    while True:
        try:
            pattern = _draw(generator, longest)
        except GeometryError:
            continue
        if min(pattern.query_tokens, pattern.key_tokens, pattern.heads) == 0:
            continue
        if max(pattern.query_tokens, pattern.key_tokens) <= most_tokens:
            return pattern


def _draw(generator: random.Random, longest: int) -> AttentionPattern:
    rank = generator.randint(1, 3)
    lengths = tuple(generator.randint(1, longest) for _ in range(rank))
    kind = generator.choice(("self", "self", "self", "slab", "cache", "cross"))
    alike = generator.choice((0.0, 0.0, 0.6))  # more grids that windows can link to each other

    def segment() -> Segment:
        if generator.random() < alike:
            return GridTokens(
                tuple(length if generator.random() < 0.85 else 1 for length in lengths)
            )
        return _segment(generator, lengths, longest)

    keys = [segment() for _ in range(generator.randint(1, 4))]
    queries: list[Segment] = list(keys)
    if kind == "slab":
        queries = [_boxed(generator, segment) for segment in keys]
        keys = [_boxed(generator, s, around=q) for s, q in zip(keys, queries, strict=True)]
    elif kind == "cache":
        queries = queries[generator.randrange(len(queries)) :]
        queries = [_boxed(generator, segment) for segment in queries]
    elif kind == "cross":
        queries = [segment() for _ in range(generator.randint(1, 3))]
    links = tuple(tuple(_link(generator, query, key) for key in keys) for query in queries)
    if generator.random() < 0.1:
        links = tuple(tuple(Link(min(link, 1)) for link in row) for row in links)
    groups, dilated = [], generator.choice((0.1, 0.3, 0.9))
    for _ in range(generator.randint(1, 3)):
        windows = tuple(
            None if generator.random() < 0.2 else _window(generator, segment.grid, dilated)
            for segment in queries
            if isinstance(segment, GridTokens)
        )
        groups.append(HeadGroup(generator.choice((0, 1, 1, 2)), windows))
    if generator.random() < 0.2:
        groups.append(groups[-1])
    pattern = AttentionPattern(tuple(queries), tuple(keys), links, tuple(groups), partial=True)
    # Keys that are not at hand are missing nearly always, unless the window is very small.
    is_partial = pattern.missing_key is not None or generator.random() < 0.3
    return replace(pattern, partial=is_partial)


def _segment(generator: random.Random, lengths: tuple[int, ...], longest: int) -> Segment:
    kind = generator.random()
    if kind < 0.35:
        return GlobalTokens(generator.randint(0, 5))
    if kind < 0.55:
        return GridTokens(lengths)
    if kind < 0.8:
        return GridTokens(tuple(generator.choice((1, length)) for length in lengths))
    rank = generator.randint(1, 3)
    return GridTokens(tuple(generator.randint(1, longest) for _ in range(rank)))


def _boxed(generator: random.Random, segment: Segment, around: Segment | None = None) -> Segment:
    """The same, or a box of the same grid, which holds the box of `around`."""
    if isinstance(segment, GlobalTokens) or generator.random() < 0.3:
        return segment
    start, stop = [], []
    for axis, length in enumerate(segment.grid):
        low, high = 0, length
        if isinstance(around, GridTokens):
            low, high = around.start[axis], around.stop[axis]
            start.append(generator.randint(0, low))
            stop.append(generator.randint(high, length))
            continue
        start.append(generator.randint(low, high - 1))
        stop.append(generator.randint(start[-1] + 1, high))
    return GridTokens(segment.grid, tuple(start), tuple(stop))


def _link(generator: random.Random, query: Segment, key: Segment) -> Link:
    can_align = (
        isinstance(query, GridTokens)
        and isinstance(key, GridTokens)
        and query.rank == key.rank
        and all(a == b or 1 in (a, b) for a, b in zip(query.grid, key.grid, strict=True))
    )
    if can_align and generator.random() < 0.7:
        return Link.WINDOW
    return Link.NONE if generator.random() < 0.2 else Link.FULL


def _window(generator: random.Random, grid: tuple[int, ...], dilated: float) -> Window:
    rows: list[tuple[Any, ...]] = []
    for length in grid:
        dilation = generator.randint(1, min(length, 3)) if generator.random() < dilated else 1
        window = generator.randint(1, length // dilation)
        if generator.random() < 0.25:
            dilation, window = 1, length
        stride = generator.randint(1, window)
        rows.append((window, stride, dilation, generator.random() < 0.2))
    return Window(*map(tuple, zip(*rows, strict=True)))


def split(pattern: AttentionPattern, seed: int) -> AttentionPattern:
    """An equal pattern, written in more parts: segments of global tokens and head groups in two."""
    generator = random.Random(seed)
    queries, keys = list(pattern.queries), list(pattern.keys)
    links = [list(row) for row in pattern.links]
    for place in reversed(range(len(queries))):
        segment = queries[place]
        if isinstance(segment, GlobalTokens) and segment.tokens > 1:
            first = generator.randint(1, segment.tokens - 1)
            queries[place : place + 1] = [
                GlobalTokens(first),
                GlobalTokens(segment.tokens - first),
            ]
            links.insert(place, list(links[place]))
    for place in reversed(range(len(keys))):
        segment = keys[place]
        if isinstance(segment, GlobalTokens) and segment.tokens > 1:
            first = generator.randint(1, segment.tokens - 1)
            keys[place : place + 1] = [GlobalTokens(first), GlobalTokens(segment.tokens - first)]
            for row in links:
                row.insert(place, row[place])
    groups = []
    for group in pattern.head_groups:
        if group.heads > 1 and generator.random() < 0.7:
            groups += [HeadGroup(1, group.windows), HeadGroup(group.heads - 1, group.windows)]
        else:
            groups.append(group)
    return AttentionPattern(
        tuple(queries), tuple(keys), tuple(map(tuple, links)), tuple(groups), pattern.partial
    )


def size(pattern: AttentionPattern) -> int:
    return math.prod((pattern.heads, pattern.query_tokens, pattern.key_tokens))


def rank_of_a_video(frames: int, side: int, text: int = 5) -> AttentionPattern:
    """A rank's frames and text, of a video with its halo, an image that is aligned with it, and text."""
    grid = (3 * frames, side, side)
    mine = GridTokens(grid, (frames, 0, 0), (2 * frames, side, side))
    halo = GridTokens(grid, (frames - 1, 0, 0), (2 * frames + 1, side, side))
    return AttentionPattern(
        (GlobalTokens(text), mine),
        (GlobalTokens(text), halo, GridTokens((1, side, side)), GlobalTokens(3)),
        (
            (Link.FULL, Link.NONE, Link.FULL, Link.NONE),
            (Link.FULL, Link.WINDOW, Link.WINDOW, Link.FULL),
        ),
        (HeadGroup(4, (Window((3, 5, 5), causal=(False, True, False)),)),),
    )
