"""What tiles cost on a GPU generation, and the time of a plan by it.

All rates are per clock and per SM (`units` counts them). `docs/planner.md` says where each
number is from; some are fitted to measured times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Architecture:
    """One GPU generation: where its kernel runs, and what tiles cost there.

    Attributes:
        name: of its provider, its library and its folder in csrc: "sm90", ...
        capabilities: major and minor, of the GPUs that the kernel runs on.
        tested_on: names of the GPUs on which the kernel's whole test suite has passed.
        units: SMs.
        clock: cycles per nanosecond.
        flops: of 16-bit matrix work, per clock.
        exponentials: per clock.
        start: cycles of a query tile besides its key tiles and the transfer of its rows.
        mask_elements: elements of a partial block that are masked per clock, by bitmasks.
        bytes: between L2 cache and shared memory, per clock.
        tiles: tokens of a query tile and of a key tile: kBlockM and kBlockN.
        query_parts: how many boxes a query box is read in, cut along its first axes.
        max_step: the largest dilation of an axis along which a box may hold more than one token.
        max_span: the most tokens from end to end of a box along one axis, dilation included.
        product_coordinates: the most coordinates of a key box, summed over three axes, at which it
            is masked by an MMA (additive mask) instead; 0 if none is.
        product_elements: elements of a partial block that such a mask covers per clock.
    """

    name: str
    capabilities: tuple[tuple[int, int], ...]
    units: int
    clock: float
    flops: int
    exponentials: float
    start: float
    mask_elements: float
    bytes: float
    tiles: tuple[tuple[int, int], ...]
    tested_on: frozenset[str] = frozenset()
    query_parts: int = 1
    max_step: int = 8
    max_span: int = 256
    product_coordinates: int = 0
    product_elements: float = math.inf

    def launch(
        self, query_tile: int, key_box: Sequence[int], heads: int, head_dim: int, element_bytes: int
    ) -> Launch:
        """The costs of these query and key tiles; `heads`: batch x heads of the launch."""
        pairs = query_tile * math.prod(key_box)
        coordinates = sum(key_box) + 3 - len(key_box)
        by_product = coordinates <= self.product_coordinates
        return Launch(
            row=self.start + 2 * query_tile * head_dim * element_bytes / self.bytes,
            tile=4 * pairs * head_dim / self.flops + pairs / self.exponentials,
            mask=pairs / (self.product_elements if by_product else self.mask_elements),
            heads=heads,
            units=self.units,
            clock=self.clock,
        )


class Launch(NamedTuple):
    """Cycles of one SM for the parts of a launch.

    Attributes:
        row: prologue and epilogue of a query tile: queries are loaded, the output is stored.
        tile: both MMAs and the softmax of a full block, one after the other.
        mask: what a partial block takes on top of that.
        heads: batch x heads.
        units, clock: the architecture's.
    """

    row: float
    tile: float
    mask: float
    heads: int
    units: int
    clock: float

    def milliseconds(self, rows: int, visited: int, partial: int, longest: int) -> float:
        """Predicted time.

        Query tiles are distributed over the SMs one by one. The time is the number of waves times
        the mean query tile, and at least the longest query tile.

        Args:
            rows: query tiles of one head.
            visited, partial: key tiles, summed over them.
            longest: the most key tiles that one of them visits.
        """
        cycles = rows * self.row + visited * self.tile + partial * self.mask
        waves = -(-rows * self.heads // self.units)
        return max(waves * cycles / rows, longest * self.tile) / self.clock * 1e-6
