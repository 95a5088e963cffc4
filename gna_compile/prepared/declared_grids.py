"""Declared grids, held against the inputs of the model at each call.

A graph of a block alone shows no grid, so a declared one is taken at its word there, and a token
count cannot tell a landscape from a portrait. The inputs of the whole model can: position ids, the
latent's shape, or arguments that are sizes. The first call must agree with what is declared, each
axis of the latent being a whole number of patches; from then on another size means the grid that
follows from the same patches. Where several inputs could be the latent, and only some of them change,
the grid is not known.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from gna_compile.graph.tokens.position_ids import (
    Piece,
    SeenIds,
    images_in,
    inner_pieces,
    may_be_ids,
    words_of_pieces,
)
from gna_compile.prepared.packed_grid import Grid, PackedGrid, Segments

# Which dimensions of a latent are axes of space: [B, C, H, W]; with frames [B, C, T, H, W],
# [B, T, C, H, W] or [B, T, H, W, C]; in a list [C, T, H, W] or [T, C, H, W].
_READINGS: dict[tuple[int, bool], tuple[tuple[int, ...], ...]] = {
    (4, False): ((2, 3),),
    (5, False): ((2, 3, 4), (1, 3, 4), (1, 2, 3)),
    (4, True): ((1, 2, 3), (0, 2, 3)),
}
_LARGEST_PATCH_OF_FRAMES = 8
_NO_LATENT = re.compile(r"mask|rotary|rope|freq|bias|ids$")
_SIZE = re.compile(r"frames|height|width|size|shape|grid|resolution|thw|hw$")


_LEAVES = (torch.Tensor, nn.Module, Enum)


@dataclass(frozen=True)
class Sight:
    """What an input of one call, or several together, say of the grid.

    Attributes:
        name: of the inputs.
        words: the inputs and their sizes, for people.
        readings: for each way to read them, the sizes along the axes of space, and what must stay
            the same (channels) for it to be the same way.
        segments: the grids themselves, where inputs name them.
        patch: height and width of a patch of these inputs, if known.
    """

    name: str
    words: str
    readings: Mapping[Any, tuple[Grid, Grid]] = field(default_factory=dict)
    patch: Grid | None = None
    segments: Segments | None = None


@dataclass
class Followed:
    """A declared grid, and in which patches it lay on the inputs that agreed with it."""

    declared: Grid
    patches: dict[Any, tuple[Grid, Grid]] = field(default_factory=dict)

    def at(self, sight: Sight) -> Grid | None:
        """What the grid is in a call with these inputs; None if it does not follow from them."""
        known = self.patches.keys() & sight.readings.keys()
        if not known:
            for way, (sizes, rest) in sight.readings.items():
                patches = _patches(self.declared, sizes)
                if patches is not None and sight.patch in (None, patches[-2:]):
                    self.patches[way] = patches, rest
            return self.declared if self.patches.keys() & sight.readings.keys() else None
        found = set()
        for way in known:
            patches, rest = self.patches[way]
            sizes, theirs = sight.readings[way]
            inner = sizes[-len(patches) :]
            whole = all(s and s % p == 0 for s, p in zip(inner, patches, strict=True))
            if theirs == rest and whole:
                grid = tuple(size // patch for size, patch in zip(inner, patches, strict=True))
                found.add(self.declared[: -len(grid)] + grid)
        return found.pop() if len(found) == 1 else None


def is_checkable(declared: Segments) -> bool:
    """Whether sizes of an input can tell anything of it: one axis may be anything flattened."""
    first = declared[0]
    return len(declared) > 1 or (isinstance(first, tuple) and len(_without_units(first)) > 1)


def _as_declared(segments: Segments, declared: Segments) -> Segments | None:
    """Segments without leading axes of length 1 that are not declared; None if they are others."""
    if len(segments) != len(declared):
        return None
    found: list[int | Grid] = []
    for now, then in zip(segments, declared, strict=True):
        if isinstance(now, tuple) and isinstance(then, tuple):
            units = max(len(now) - len(then), 0)
            if now[:units] != (1,) * units or len(now) < len(then):
                return None
            found.append(now[units:])
        elif isinstance(now, tuple) or isinstance(then, tuple):
            return None
        else:
            found.append(now)
    return tuple(found)


def _patches(grid: Grid, sizes: Grid) -> Grid | None:
    """The patch along each of the last axes, or None if there are no such patches.

    Axes in front of those of the grid (frames that are attended one by one) have none.
    """
    if len(grid) != len(sizes) or sizes[0] != grid[0] == 1:
        grid = _without_units(grid)
    inner = sizes[-len(grid) :]
    if len(inner) < len(grid) or any(s % g for s, g in zip(inner, grid, strict=True)):
        return None
    patches = tuple(size // length for size, length in zip(inner, grid, strict=True))
    *frames, height, width = patches
    plausible = height == width > 0 and all(0 < p <= _LARGEST_PATCH_OF_FRAMES for p in frames)
    return patches if plausible else None


def _without_units(grid: Grid) -> Grid:
    first = next((i for i, size in enumerate(grid) if size != 1), len(grid))
    return grid[first:]


def _patch_of(module: nn.Module) -> Grid | None:
    """Height and width of a patch of the latent, if the model's configuration has them."""
    size = getattr(getattr(module, "config", None), "patch_size", None)
    sizes = (size, size) if isinstance(size, int) else size
    if not isinstance(sizes, list | tuple) or len(sizes) not in (2, 3):
        return None
    return tuple(sizes[-2:])


class Watch:
    """Looks at the inputs of one module at each of its calls.

    Args:
        shown: the grids of the attention modules below it.
        reads_ids: whether its position ids are the grid of what is below it.
    """

    def __init__(self, shown: Sequence[PackedGrid], reads_ids: bool) -> None:
        self.shown, self.reads_ids = tuple(shown), reads_ids
        self._ids: dict[str, SeenIds] = {}
        self._followed: dict[Grid, dict[str, Followed]] = {}
        self._agreed_with: dict[Grid, Mapping[str, Any]] = {}
        self._first: dict[str, Any] | None = None
        self._named: set[Segments] = set()
        self._has_seen = False

    def look(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Shows what this call's inputs say.

        Costs one comparison of position ids with those of the call before, which waits for the
        device that they are on, and a look at shapes and numbers.
        """
        inputs = list(_inputs(module, args, kwargs))
        pieces = self._pieces(inputs)
        if self.reads_ids:
            for shown in self.shown:
                shown.show(inner_pieces(pieces or ()))
        if not any(shown.declared for shown in self.shown):
            return
        sights = _sights(inputs, pieces, _patch_of(module))
        for shown in self.shown:
            if not sights and shown.is_seen and not self._has_seen:
                continue  # a module around this one has seen more
            for place, declared in enumerate(shown.declared, 1):
                shown.show(*self._now(declared, sights, inputs), place)
            shown.is_seen |= bool(sights)
        self._has_seen |= bool(sights)

    def _now(
        self, declared: Segments, sights: Sequence[Sight], inputs: Sequence[Input]
    ) -> tuple[Segments | None, str]:
        """What a declared layout is in this call, or why it is none."""
        what = f"declared is the {words_of_pieces(declared)}"
        if sights and is_checkable(declared):
            segments, why = self._seen(declared, sights)
            return segments, "" if segments else f"{what}, {why}"
        if self._has_seen and not sights:
            return None, f"{what}, and no input of this call shows whether it holds"
        sizes = dict(_sizes(inputs))
        if self._first is None:
            self._first = sizes
        changed = [name for name in self._first | sizes if self._first.get(name) != sizes.get(name)]
        if not changed:
            return declared, ""
        words = ", ".join(f"{n} was {self._first.get(n)} and is {sizes.get(n)}" for n in changed)
        return None, f"{what} when the model was first called, but since then {words}"

    def _seen(self, declared: Segments, sights: Sequence[Sight]) -> tuple[Segments | None, str]:
        """What inputs show of a declared layout; why it is none."""
        named = [sight for sight in sights if sight.segments is not None]
        if len(declared) == 1 and isinstance(declared[0], tuple):
            several = [sight for sight in named if len(sight.segments or ()) > 1]
            if several:
                return None, f"which does not fit {several[0].words}"
            grid, why = self._agreed(declared[0], sights)
            return None if grid is None else (grid,), why
        if len(named) != 1:
            return None, f"which does not follow from {' and '.join(s.words for s in sights)}"
        (sight,) = named
        now = _as_declared(sight.segments or (), declared)
        if now is None or (declared not in self._named and now != declared):
            return None, f"which does not fit {sight.words}"
        if any(
            declared[i] == declared[j] and now[i] != now[j]
            for i, j in itertools.combinations(range(len(now)), 2)
        ):
            # Which comes first could not be seen as long as they were equal.
            return None, f"whose order does not follow from {sight.words}"
        self._named.add(declared)
        return now, ""

    def _agreed(self, declared: Grid, sights: Sequence[Sight]) -> tuple[Grid | None, str]:
        """The grid on which all inputs agree that can show it; why there is none."""
        followed = self._followed.setdefault(declared, {})
        grids = {
            sight.name: followed.setdefault(sight.name, Followed(declared)).at(sight)
            for sight in sights
        }
        now = {sight.name: sight.readings for sight in sights}
        if declared not in self._agreed_with:
            if declared not in grids.values():
                return None, f"which does not fit {sights[0].words}"
            self._agreed_with[declared] = now
        before = self._agreed_with[declared]
        changed = [sight for sight in sights if before.get(sight.name) != sight.readings]
        if not changed and now.keys() == before.keys():
            return declared, ""
        showing = {name: grid for name, grid in grids.items() if followed[name].patches}
        words = " and ".join(sight.words for sight in changed or sights)
        if len(set(showing.values())) == 1 and any(sight.name in showing for sight in changed):
            return next(iter(showing.values())), f"which does not fit {words}"
        return None, f"which does not follow from {words}: not all sizes that show it changed alike"

    def _pieces(self, inputs: Sequence[Input]) -> tuple[Piece, ...] | None:
        """What position ids enumerate; None if there are no ids, () if they cannot be read.

        In which order the images of several inputs come nothing says, nor whether text that is among
        the ids at an end is part of the tokens.
        """
        found: list[tuple[Piece, ...]] = []
        for name, value, _ in inputs:
            if isinstance(value, torch.Tensor) and may_be_ids(name, value):
                pieces = self._ids.setdefault(name, SeenIds()).pieces((value, None))
                if name == IDS or images_in(pieces):
                    found.append(pieces if inner_pieces(pieces) == pieces else ())
        return found[0] if len(found) == 1 else () if found else None


IDS = "img_ids"
Input = tuple[str, Any, bool]  # name, value, whether it is an element of a list


def _inputs(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Input]:
    """The arguments of a call by name, also those in dicts and lists, in the signature's order."""
    try:
        arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # the call itself will say what is wrong with it
        arguments = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
    for name, value in arguments.items():
        yield from _flat(name, value, False)


def _flat(name: str, value: Any, in_list: bool) -> Iterator[Input]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(str(key), item, False)
    elif isinstance(value, list | tuple) and any(isinstance(v, torch.Tensor | dict) for v in value):
        for item in value:
            yield from _flat(name, item, isinstance(value, list))
    elif hasattr(value, "__dict__") and not isinstance(value, _LEAVES) and not callable(value):
        for key, item in vars(value).items():
            if isinstance(item, torch.Tensor | int | list | tuple):
                yield from _flat(key, item, False)
    else:
        yield name, value, in_list


def _sights(
    inputs: Sequence[Input], pieces: Sequence[Piece] | None, patch: Grid | None
) -> list[Sight]:
    """What shows the grid: position ids, else shapes of what may be the latent, sizes as arguments."""
    if pieces is not None:
        segments = inner_pieces(pieces)
        if segments is None:
            return [Sight("ids", "position ids, which show none")]
        words = f"position ids, which show {words_of_pieces(segments)}"
        return [_named_sight("ids", words, segments, patch=(1, 1))]
    return [*_latents(inputs, patch), *_shapes(inputs), *_numbers(inputs)]


def _named_sight(name: str, words: str, segments: Segments, patch: Grid | None = None) -> Sight:
    """Of inputs that name the grids themselves."""
    first = segments[0]
    if len(segments) > 1:
        return Sight(name, words, segments=segments)
    assert isinstance(first, tuple)
    return Sight(name, words, {name: (first, ())}, patch, segments)


def _latents(inputs: Sequence[Input], patch: Grid | None) -> Iterator[Sight]:
    latents = [
        (name, tuple(value.shape), in_list)
        for name, value, in_list in inputs
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and (value.ndim, in_list) in _READINGS
        and not _NO_LATENT.search(name)
    ]
    seen: set[str] = set()
    for name, shape, in_list in latents:
        if name in seen:
            continue
        seen.add(name)
        sizes = {other for theirs, other, listed in latents if theirs == name and listed}
        words = f"{name} of {_times(shape)}"
        if len(sizes) > 1:
            yield Sight(name, f"{words} beside others")
            continue
        readings = {}
        for axes in _READINGS[len(shape), in_list]:
            rest = tuple(
                size for d, size in enumerate(shape) if d not in axes and (d or in_list)
            )  # all but the batch
            readings[name, len(shape), axes] = tuple(shape[axis] for axis in axes), rest
        yield Sight(name, words, readings, patch)


def _shapes(inputs: Sequence[Input]) -> Iterator[Sight]:
    """`img_shapes` and the like: for each sample a list of (frames, height, width)."""
    for name, value, _ in inputs:
        if name.endswith("shapes") and isinstance(value, list | tuple) and value:
            samples = [[item] if _is_shape(item) else item for item in value]
            if not all(
                isinstance(s, list | tuple) and s and all(map(_is_shape, s)) for s in samples
            ):
                continue
            if len({tuple(map(tuple, sample)) for sample in samples}) > 1:
                yield Sight(name, f"{name}, which differ between samples")
                return
            shapes = tuple(tuple(shape) for shape in samples[0])
            yield _named_sight(name, f"{name} of {words_of_pieces(shapes)}", shapes)
            return


def _is_shape(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) in (2, 3)
    return is_list and all(type(size) is int for size in value)


def _numbers(inputs: Sequence[Input]) -> Iterator[Sight]:
    found = {name: value for name, value, _ in inputs if type(value) is int}
    names = [name for name in ("num_frames", "height", "width") if name in found]
    if names[-2:] == ["height", "width"]:
        words = ", ".join(f"{name} {found[name]}" for name in names)
        yield Sight("sizes", words, {tuple(names): (tuple(found[name] for name in names), ())})


def _sizes(inputs: Sequence[Input]) -> Iterator[tuple[str, Any]]:
    """What stays the same from call to call while the grid does: sizes without the batch."""
    has_tokens = False
    for name, value, in_list in inputs:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and value.ndim > 2 and not has_tokens:
                has_tokens = True
                yield name, tuple(value.shape if in_list else value.shape[1:])
            elif _SIZE.search(name) and _is_small(value):
                yield name, value.tolist()
        elif _SIZE.search(name) and not isinstance(value, float | bool | str | None):
            yield name, value


def _is_small(value: torch.Tensor) -> bool:
    whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return whole and not value.is_meta and value.numel() <= 64


def _times(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))
