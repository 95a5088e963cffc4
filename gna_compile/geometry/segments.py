"""What a sequence is made of: an ordered list of segments, each a run of its tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gna_compile.geometry.axis import GeometryError


@dataclass(frozen=True)
class GlobalTokens:
    """Tokens off any grid (text, CLS, registers).

    Args:
        tokens: how many, at least 0.

    Raises:
        GeometryError: if there are fewer.
    """

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise GeometryError(
                f"a segment of {self.tokens} global tokens; it must have at least 0"
            )

    def __str__(self) -> str:
        return str(self.tokens)


@dataclass(frozen=True)
class GridTokens:
    """A grid of tokens in raster order (last axis fastest), or a box of it.

    Windows are those of the whole grid, in its coordinates; the sequence holds the box alone: a
    rank's part of the grid with its halo, the frames in a KV cache, the new frames.

    Args:
        grid: tokens along each axis of the whole grid, slowest first; one to three of them.
        start: the box's first token along each axis; the grid's by default.
        stop: the token after the box's last along each axis; the grid's end by default.

    Raises:
        GeometryError: if the grid has another rank, or the box is empty or sticks out.

    Example:
        >>> GridTokens((8, 24, 32), start=(0, 6, 0), stop=(8, 12, 32)).tokens
        1536
    """

    grid: tuple[int, ...]
    start: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rank = len(self.grid)
        if not 1 <= rank <= 3:
            raise GeometryError(f"a grid has 1 to 3 axes, not {rank}")
        object.__setattr__(self, "start", self.start or (0,) * rank)
        object.__setattr__(self, "stop", self.stop or self.grid)
        for name, values in (("start", self.start), ("stop", self.stop)):
            if len(values) != rank:
                raise GeometryError(
                    f"{name} has {len(values)} entries for a grid of {rank} axes {self.grid}"
                )
        for axis, (length, start, stop) in enumerate(
            zip(self.grid, self.start, self.stop, strict=True)
        ):
            if length < 1:
                raise GeometryError(
                    f"axis {axis} of grid {self.grid}: grid length {length} must be at least 1"
                )
            if not 0 <= start < stop <= length:
                raise GeometryError(
                    f"axis {axis} of grid {self.grid}: {start}..{stop} is not a non-empty box "
                    f"within 0..{length}"
                )

    @property
    def rank(self) -> int:
        return len(self.grid)

    @property
    def box(self) -> tuple[range, ...]:
        """The tokens at hand along each axis, in the whole grid's coordinates."""
        return tuple(map(range, self.start, self.stop))

    @property
    def shape(self) -> tuple[int, ...]:
        """The box's extents: how the tokens at hand lie."""
        return tuple(map(len, self.box))

    @property
    def tokens(self) -> int:
        """Tokens at hand."""
        return math.prod(self.shape)

    def is_whole(self, axis: int | None = None) -> bool:
        """Whether all of the grid, or of one of its axes, is at hand."""
        if axis is None:
            return self.shape == self.grid
        return self.shape[axis] == self.grid[axis]

    def place(self, token: int) -> tuple[int, ...]:
        """Where a token at hand lies in the whole grid."""
        place = []
        for start, extent in zip(reversed(self.start), reversed(self.shape), strict=True):
            place.append(start + token % extent)
            token //= extent
        return tuple(reversed(place))

    def __str__(self) -> str:
        text = "x".join(map(str, self.grid))
        if self.is_whole():
            return text
        box = ", ".join(
            f"{start}:{stop}" for start, stop in zip(self.start, self.stop, strict=True)
        )
        return f"{text}[{box}]"


Segment = GlobalTokens | GridTokens


def tokens_of(segments: Sequence[Segment]) -> int:
    """Tokens of a sequence."""
    return sum(segment.tokens for segment in segments)


def ranges_of(segments: Sequence[Segment]) -> Iterator[range]:
    """Where each segment lies in its sequence."""
    start = 0
    for segment in segments:
        yield range(start, start + segment.tokens)
        start += segment.tokens


def text_of(segments: Sequence[Segment]) -> str:
    """A sequence as reports print it: `512 + 33x45x80 + 7`."""
    return " + ".join(map(str, segments))
