"""Strides that are nearly perfectly block-sparse, and the nearest one that is."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from gna_compile.geometry import Axis
from gna_compile.planner.counts import Tiling, axis_counts
from gna_compile.planner.search import Workload, architecture_of, plan


@lru_cache(maxsize=1024)
def better_stride(
    workload: Workload, architecture: str = "sm90", tiling: Tiling = "dynamic"
) -> tuple[int, ...] | None:
    """The nearest stride, changed on one axis, with which no key tile of the grid needs a mask.

    Returns:
        The stride on all axes; None if the present one needs no mask either, if no change of one
        axis is enough, or if none is predicted to be faster.
    """
    now = plan(workload, architecture, tiling)
    if now.is_block_sparse:
        return None
    axes = workload.neighborhood.axes
    largest = max(tile for tile, _ in architecture_of(architecture).tiles)
    candidates = [
        (abs(stride - axis.stride), -stride, index)
        for index, axis in enumerate(axes)
        for stride in _near(axis, largest)
    ]
    for _, negative, index in sorted(candidates):
        changed = (*axes[:index], replace(axes[index], stride=-negative), *axes[index + 1 :])
        if not _block_sparse(changed, architecture, tiling):
            continue
        neighborhood = replace(workload.neighborhood, axes=changed)
        better = plan(replace(workload, neighborhood=neighborhood), architecture, tiling)
        if better.milliseconds < now.milliseconds:
            return tuple(axis.stride for axis in changed)
    return None


def _near(axis: Axis, largest: int) -> set[int]:
    """The multiples of each power of two on either side of the stride, as far as they are legal."""
    near, unit = set(), 2
    while unit <= min(largest, axis.window):
        below = axis.stride // unit * unit
        near |= {below, below + unit}
        unit *= 2
    return {stride for stride in near if 1 <= stride <= axis.window and stride != axis.stride}


def _block_sparse(axes: tuple[Axis, ...], architecture: str, tiling: Tiling) -> bool:
    """Whether some pair of power-of-two boxes of the kernel's tiles needs no mask."""
    tiles = set(architecture_of(architecture).tiles)
    extents = [1 << shift for shift in range(max(map(max, tiles)).bit_length())]
    reached = {(1, 1)}
    for axis in axes:
        maskless = set()
        for query in extents:
            for key in extents:
                counts = axis_counts(axis, query, key, tiling)
                if counts.visited == counts.full:
                    maskless.add((query, key))
        reached = {(q * query, k * key) for q, k in reached for query, key in maskless}
    return bool(tiles & reached)
