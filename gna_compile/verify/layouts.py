"""`verify="layouts"`: whether tokens lie as a rewritten attention claims, shown on the real inputs.

Before a graph runs for the first time, parts of its inputs are changed, and it is seen which rows of
the queries, keys and values react (`graph/probe.py`). This knows nothing of how the layouts were
found. First each dimension of each floating input is cut: a dimension along which a thin slab moves
a part of the rows only is one that tokens lie along; one of which it moves all rows, of some batch
rows only, is a batch. Then the axes of the claimed grid are laid along these dimensions in every way
that fits, and single cells are changed, all corners and some others. A claim holds if there is a way
in which every cell moves its row, of queries, keys and values alike, and no row far from it.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import re
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from gna_compile.graph.symbols import is_known
from gna_compile.graph.tokens.layouts import Layout, same_grid, times
from gna_compile.graph.tokens.position_ids import may_be_ids, one_grid, runs_from_ids
from gna_compile.lower import Lowered
from gna_compile.verify.probe import OPERANDS, Call, Claim, Probe

if TYPE_CHECKING:
    from gna_compile.decision import Decision

log = logging.getLogger("gna_compile")

_RANDOM_CELLS = 4
_MOST_FITS = 24
_MOVED, _LARGE = 0.1, 0.5
"""Shares of the largest reaction: a row reacts at all, or as the one that was changed does."""
_FAINT = 0.02
"""And where something reaches it from far, such as a normalization of all."""
_ALONG_IT = ("spatial", "cut", "blurred")
"""Kinds of dimensions that tokens lie along; in the last, every token feels a little of all."""
_DRAWS = 3
_MOST_OF_ROWS = 0.75
"""The rows that a slab across a dimension moves are no part of all if they are more."""
_ALONG = 2
"""How far along a sequence a convolution may spread a change."""
_OWNED = re.compile(r"^L\['self'\]\.|_(buffers|modules|parameters)\b")


class LayoutError(RuntimeError):
    """Tokens do not lie as a rewritten attention claims; raised under `verify="layouts"` only.

    The message names the layer, the claimed layout, the cell of an input that was changed, the row
    that should have reacted, those that did, and what to do.
    """


class VerifiedAtFirstCall:
    """Verifies the layouts of a graph before it runs for the first time, and then only runs it.

    Args:
        run: the lowered graph.
        verification: what to do before.
    """

    def __init__(self, run: Lowered, verification: Verification) -> None:
        self._run = run
        self._pending: Verification | None = verification
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        if self._pending is not None:
            self._verify(inputs)
        return self._run(*inputs)

    @torch.compiler.disable
    def _verify(self, inputs: Sequence[Any]) -> None:
        with self._lock:
            if self._pending is not None:
                self._pending(inputs)
                self._pending = None


@dataclass(frozen=True)
class Verification:
    """The check of one graph; called with its real inputs.

    Attributes:
        probe: the graph, with its rewritten attentions watched.
        layers: the layer of each of these, and where its layouts are from.
        names: what the model calls each input; "" for a tensor of a module.
    """

    probe: Probe
    layers: tuple[tuple[str, str], ...]
    names: tuple[str, ...]

    @staticmethod
    def of(gm: fx.GraphModule, variants: Sequence[Sequence[Decision]]) -> Verification:
        """The check of what any variant of a graph rewrites."""
        rewritten: dict[Any, list[Layout]] = {}
        named: dict[Any, tuple[str, str]] = {}
        for decision in itertools.chain.from_iterable(variants):
            layout = decision.layout
            if not decision.is_rewritten or layout is None:
                continue
            known = rewritten.setdefault(decision.site, [])
            named.setdefault(decision.site, (decision.layer, layout.source))
            if not any(_is_same(layout, other) for other in known):
                known.append(layout)
        names = tuple(map(_name_of_input, gm.graph.find_nodes(op="placeholder")))
        probe = Probe(gm, list(rewritten.items()), [d.site for d in variants[0]])
        return Verification(probe, tuple(named.values()), names)

    def __call__(self, inputs: Sequence[Any]) -> None:
        """Raises LayoutError for a layout that does not hold; warns of what cannot be told."""
        try:
            _Trial(self, inputs).run()
        except LayoutError:
            raise
        except Exception as error:
            names = ", ".join(dict.fromkeys(layer for layer, _ in self.layers))
            log.warning(
                "the layouts of %s could not be verified: the graph does not run as it is (%s: %s)",
                names,
                type(error).__name__,
                str(error).split("\n")[0],
            )


def _is_same(one: Layout, other: Layout) -> bool:
    sizes = zip((*one.grid, one.prefix), (*other.grid, other.prefix), strict=False)
    return len(one.grid) == len(other.grid) and all(is_known(a == b) for a, b in sizes)


def _name_of_input(node: fx.Node) -> str:
    source = getattr(getattr(node, "_dynamo_source", None), "name", "")
    source = str(source() if callable(source) else source)
    if _OWNED.search(source):
        return ""
    parts = re.findall(r"\w+", source)
    return parts[-1] if parts and not parts[-1].isdigit() else node.name


# --- how a grid may lie along the dimensions of an input -----------------------------------------


@dataclass(frozen=True)
class _Fit:
    """Neighboring axes of a grid along one dimension of an input.

    Attributes:
        dim: the dimension, of length `size`.
        axes: the axes, of together `cells` cells in raster order.
        step: elements to a cell; 0 if they do not divide.
        windows: how often the cells follow one after another, each time in another batch row.
        offset: elements before the first cell.
    """

    dim: int
    size: int
    axes: tuple[int, ...]
    cells: int
    step: int
    windows: int = 1
    offset: int = 0

    def stretch(self, cell: int, window: int) -> tuple[int, int]:
        """The elements of a cell."""
        if self.step:
            start = self.offset + (window * self.cells + cell) * self.step
            return start, start + self.step
        start = cell * self.size // self.cells
        return start, max(start + 1, (cell + 1) * self.size // self.cells)


def _fits(
    dim: int, size: int, axes: tuple[int, ...], grid: Sequence[int], is_cut: bool
) -> list[_Fit]:
    """The ways to lay axes along a dimension; `is_cut`: its stretches are in several batch rows."""
    cells = math.prod(grid[axis] for axis in axes)
    fit = partial(_Fit, dim, size, axes, cells)
    if size % cells:
        return [fit(0)] if len(axes) == 1 and size > cells else []
    ratio = size // cells
    found = [fit(ratio)]
    if is_cut:
        found += [fit(step, ratio // step) for step in range(1, ratio) if ratio % step == 0]
    return found


@dataclass(frozen=True)
class _Way:
    """A way in which a grid may lie in an input: what to change for a cell.

    Attributes:
        input: its position.
        grid: the grid.
        fits: the axes along each dimension.
        batch: further dimensions, of which one element belongs to a sequence.
        blind: how many dimensions move all tokens; if they are several, tokens may lie along one
            that a convolution reaches all over.
    """

    input: int
    grid: tuple[int, ...]
    fits: tuple[_Fit, ...]
    batch: tuple[int, ...]
    blind: int

    @property
    def is_exact(self) -> bool:
        """Whether a failure of this way speaks against the grid."""
        is_merged = any(len(fit.axes) > 1 for fit in self.fits)
        return all(fit.step for fit in self.fits) and not (is_merged and self.blind > 1)

    def rank(self) -> tuple[Any, ...]:
        """Sorts what is usual first."""
        dims = [fit.dim for fit in self.fits]
        crossed = sum(a > b for a, b in itertools.combinations(dims, 2))
        return (not self.is_exact, crossed, sum(fit.windows > 1 for fit in self.fits), self.input)

    def region(
        self, cell: Sequence[int], turn: int, shape: Sequence[int], *, is_core: bool = False
    ) -> _Region:
        """The elements of a cell in one sequence; another one at each turn.

        Args:
            is_core: only those in its middle, where patches are shifted by padding.
        """
        chance = random.Random(turn)
        bounds = [(0, size) for size in shape]
        for fit in self.fits:
            index = 0
            for axis in fit.axes:
                index = index * self.grid[axis] + cell[axis]
            start, stop = fit.stretch(index, chance.randrange(fit.windows))
            margin = (stop - start) // 4 if is_core else 0
            bounds[fit.dim] = (start + margin, stop - margin)
        for dim in self.batch:
            last = shape[dim] - 1
            index = (last, 0, chance.randint(0, last))[turn % 3]
            bounds[dim] = (index, index + 1)
        return _Region(self.input, tuple(bounds))


@dataclass(frozen=True)
class _Region:
    """A part of an input: first and last index along each dimension."""

    input: int
    bounds: tuple[tuple[int, int], ...]

    def words(self, name: str, shape: Sequence[int]) -> str:
        parts = [
            ":" if bound == (0, size) else f"{bound[0]}:{bound[1]}"
            for bound, size in zip(self.bounds, shape, strict=True)
        ]
        return f"{name}[{', '.join(parts)}]"


def _ways(
    place: int, shape: Sequence[int], claim: Claim, tokens: int, shown: _Dimensions
) -> list[_Way]:
    """The ways to lay a grid along all dimensions that tokens lie along, the usual one first."""
    grid, prefix = claim
    axes = tuple(axis for axis, length in enumerate(grid) if length > 1)
    found = []
    for cuts in itertools.combinations(range(1, len(axes)), len(shown.spatial) - 1):
        edges = (0, *cuts, len(axes))
        groups = [axes[a:b] for a, b in itertools.pairwise(edges)]
        for dims in itertools.permutations(shown.spatial):
            options = []
            for dim, group in zip(dims, groups, strict=True):
                fits = _fits(dim, shape[dim], group, grid, dim in shown.cut)
                if len(groups) == 1 and shape[dim] == tokens != math.prod(grid):
                    whole = _Fit(dim, tokens, group, math.prod(grid), 1, offset=prefix)
                    fits.insert(0, whole)
                options.append(fits)
            for fits_of_all in itertools.product(*options):
                found.append(_Way(place, grid, fits_of_all, shown.batch, shown.blind))
    return sorted(found, key=_Way.rank)[:_MOST_FITS]


def _cells(grid: Sequence[int]) -> list[tuple[int, ...]]:
    """All corners, and some others."""
    corners = itertools.product(*(sorted({length - 1, 0}) for length in grid))
    chance = random.Random(0)
    others = [tuple(map(chance.randrange, grid)) for _ in range(_RANDOM_CELLS)]
    return list(dict.fromkeys([*corners, *others]))


# --- what reacts ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dimensions:
    """What the dimensions of an input are to one attention.

    Attributes:
        spatial: tokens lie along them.
        cut: of these, those of which different stretches are in different batch rows.
        batch: different elements are in different batch rows.
        blind: how many others there are that move all tokens.
        is_sharp: whether tokens feel nothing of what lies elsewhere along these.
    """

    spatial: tuple[int, ...]
    cut: frozenset[int]
    batch: tuple[int, ...]
    blind: int
    is_sharp: bool


@dataclass(eq=False)
class _Subject:
    """A claim for one call of an attention.

    Attributes:
        place, call: which.
        shown: for each input along which its queries vary, how.
        moves: for each input, the operands that vary with it from token to token.
        feels: for each input, the operands that depend on it.
        passed: the inputs in which the grid lies as claimed.
        failures: for each input in which it does not, why, by the most usual way; None where
            that does not come from one input alone.
        verified: whether it holds.
        doubt: why nothing can be said.
    """

    place: int
    call: int
    claim: Claim
    tokens: int
    shown: dict[int, _Dimensions] = field(default_factory=dict)
    moves: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    feels: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    passed: set[int] = field(default_factory=set)
    failures: dict[int | None, str] = field(default_factory=dict)
    verified: bool = False
    doubt: str = "no floating input of the graph moves its tokens one by one"

    def on_grid(self, reaction: Tensor) -> Tensor:
        grid, prefix = self.claim
        return reaction[:, prefix : prefix + math.prod(grid)]


Reactions = tuple[Tensor, Tensor, Tensor]
"""How much each row of queries, keys and values changed: [batch, tokens] each."""


class _Trial:
    """One verification."""

    def __init__(self, verification: Verification, inputs: Sequence[Any]) -> None:
        self._probe, self._layers = verification.probe, verification.layers
        self._names, self._inputs = verification.names, inputs
        self._before = self._probe.run(inputs)
        self._candidates = [
            index
            for index, value in enumerate(inputs)
            if isinstance(value, Tensor)
            and value.is_floating_point()
            and value.ndim >= 2
            and value.numel() > 1
            and self._names[index]
            and not may_be_ids(self._names[index], value)  # positions, and no tokens
        ]
        self._subjects = [
            _Subject(place, number, claim, call.rows[0].shape[1])
            for place, calls in enumerate(self._before)
            for number, call in enumerate(calls)
            for claim in call.claims
        ]

    def run(self) -> None:
        """Raises LayoutError, or warns of what could not be verified."""
        self._look_at_dimensions()
        self._try_ways()
        for subject in self._subjects:
            if subject.passed:
                self._compare_ids(subject)
            elif not subject.failures:
                self._compare_operands(subject)
        for subject in self._subjects:
            # Where one input shows more axes than another, that is the one to be asked.
            axes = {index: len(shown.spatial) for index, shown in subject.shown.items()}
            most = max((axes[index] for index in subject.passed), default=0)
            against = [
                why
                for index, why in subject.failures.items()
                if index is None or axes[index] >= most
            ]
            if against:
                raise LayoutError(against[0])
            subject.verified = bool(subject.passed)
        self._report()

    # --- passes ---

    def _react(self, region: _Region, seed: int = 0) -> list[list[Reactions]]:
        """The reactions of every call to a change of a region."""
        inputs = list(self._inputs)
        inputs[region.input] = _changed(self._inputs[region.input], region, seed)
        after = self._probe.run(inputs)
        return [
            [_difference(old, new) for old, new in zip(before, now, strict=True)]
            for before, now in zip(self._before, after, strict=True)
        ]

    def _of(self, subject: _Subject, reactions: list[list[Reactions]]) -> Reactions:
        return reactions[subject.place][subject.call]

    # --- which dimensions tokens lie along ---

    def _look_at_dimensions(self) -> None:
        for index in self._candidates:
            shape = self._inputs[index].shape
            # Some rows feel more of any change than others: what they feel of all is the measure.
            everything = self._react_often(_Region(index, tuple((0, size) for size in shape)))
            kinds: dict[_Subject, list[tuple[int, str]]] = defaultdict(list)
            for dim, size in enumerate(shape):
                if size < 2:
                    continue
                reactions = self._cut(index, dim, size // 2)
                for subject in self._subjects:
                    found = self._kinds(subject, reactions, everything)
                    kinds[subject].append((dim, found[0]))
                    self._note_moves(subject, index, found)
                if any(looks[-1] == (dim, "cut") for looks in kinds.values()):
                    reactions = self._cut(index, dim, 0)  # keys may all be from the first batch row
                    for subject in self._subjects:
                        found = self._kinds(subject, reactions, everything)
                        self._note_moves(subject, index, found)
            for subject, looks in kinds.items():
                spatial = tuple(dim for dim, kind in looks if kind in _ALONG_IT)
                if spatial:
                    subject.shown[index] = _Dimensions(
                        spatial,
                        frozenset(dim for dim, kind in looks if kind == "cut"),
                        tuple(dim for dim, kind in looks if kind == "batch"),
                        sum(kind == "all" for _, kind in looks),
                        all(kind != "blurred" for _, kind in looks),
                    )

    def _kinds(
        self,
        subject: _Subject,
        reactions: list[list[Reactions]],
        everything: list[list[Reactions]],
    ) -> list[str]:
        """What a dimension is to the queries, keys and values."""
        pairs = zip(self._of(subject, reactions), self._of(subject, everything), strict=True)
        return [_kind(subject, reaction, whole) for reaction, whole in pairs]

    def _note_moves(self, subject: _Subject, index: int, kinds: Sequence[str]) -> None:
        for name, kind in zip(OPERANDS, kinds, strict=True):
            if kind:
                subject.feels[index].add(name)
            if kind in _ALONG_IT:
                subject.moves[index].add(name)

    def _cut(self, index: int, dim: int, start: int) -> list[list[Reactions]]:
        """The reactions to a slab across a dimension, as thin as is felt."""
        shape = self._inputs[index].shape
        size = shape[dim]
        reactions: list[list[Reactions]] = []
        for length in dict.fromkeys((max(1, size // 64), max(1, size // 8))):
            bounds = [(0, n) for n in shape]
            bounds[dim] = (start, start + length)
            reactions = self._react_often(_Region(index, tuple(bounds)))
            if any(bool(r[0].any()) for calls in reactions for r in calls):
                break
        return reactions

    def _react_often(self, region: _Region) -> list[list[Reactions]]:
        """The mean reactions to several changes of a region: one alone may cancel out in a row."""
        draws = [self._react(region, seed) for seed in range(_DRAWS)]
        return [
            [_mean([draw[place][number] for draw in draws]) for number in range(len(calls))]
            for place, calls in enumerate(draws[0])
        ]

    # --- whether cells move their rows ---

    def _try_ways(self) -> None:
        asked: dict[_Way, list[_Subject]] = defaultdict(list)
        for subject in self._subjects:
            for index, shown in subject.shown.items():
                if subject.moves[index] != set(OPERANDS):
                    continue
                shape = self._inputs[index].shape
                ways = _ways(index, shape, subject.claim, subject.tokens, shown)
                for way in ways:
                    asked[way].append(subject)
                if ways:
                    continue
                grid = subject.claim[0]
                sizes = ", ".join(str(shape[dim]) for dim in shown.spatial)
                if shown.is_sharp and len(shown.spatial) > sum(length > 1 for length in grid):
                    text = (
                        f"its tokens differ along {len(shown.spatial)} dimensions of the input "
                        f"{self._name(index)} (of lengths {sizes}), of which a cell of a grid with "
                        "so few axes cannot be one place"
                    )
                    subject.failures[index] = self._message(subject, text)
                else:
                    subject.doubt = (
                        f"the grid {times(grid)} cannot be laid along the dimensions of the input "
                        f"{self._name(index)} that move a part of its tokens (of lengths {sizes})"
                    )
        for way in sorted(asked, key=_Way.rank):
            self._try(way, [s for s in asked[way] if way.input not in s.passed])

    def _try(self, way: _Way, subjects: list[_Subject]) -> None:
        shape = self._inputs[way.input].shape
        felt: set[_Subject] = set()
        for turn, cell in enumerate(_cells(way.grid)):
            if not subjects:
                return
            region = way.region(cell, turn, shape)
            troubles: dict[_Subject, str] = {}
            suspects = subjects
            # Patches may overlap: a change that their weights hardly see shows little.
            for seed, is_core in enumerate((False, True, False)):
                part = way.region(cell, turn, shape, is_core=is_core)
                reactions = self._react(part, seed)
                found = {s: _trouble(s, cell, self._of(s, reactions)) for s in suspects}
                felt.update(s for s, trouble in found.items() if trouble is not None)
                suspects = [s for s, trouble in found.items() if trouble]
                troubles = {s: troubles.get(s) or found[s] or "" for s in suspects}
                if not suspects:
                    break
            subjects = [subject for subject in subjects if subject not in troubles]
            where = region.words(self._name(way.input), shape)
            for subject, trouble in troubles.items():
                text = f"when cell {cell} was changed ({where}), {trouble}"
                if way.is_exact:
                    subject.failures.setdefault(way.input, self._message(subject, text))
                else:
                    subject.doubt = f"it may lie otherwise in this input; {text}"
        for subject in subjects:
            if subject in felt:
                subject.passed.add(way.input)
                subject.failures.pop(way.input, None)
            else:
                subject.doubt = f"nothing moves with cells of the input {self._name(way.input)}"

    # --- what is left ---

    def _compare_operands(self, subject: _Subject) -> None:
        """Notes a failure if keys or values vary with another input than the queries."""
        if set(OPERANDS) in subject.moves.values():
            return
        for index, moved in subject.moves.items():
            for name in (name for name in OPERANDS if name not in subject.feels[index]):
                other = [i for i, names in subject.moves.items() if name in names and i != index]
                if "queries" not in moved or not (other or len(moved) == 2):
                    continue
                if name == "values" and not other:
                    continue  # a table of positions, that only queries and keys are told
                with_what = f"with {self._name(other[0])}" if other else "with no input"
                text = (
                    f"its queries vary from token to token with the input {self._name(index)}, "
                    f"its {name} {with_what}: they are not the same tokens"
                )
                subject.failures.setdefault(None, self._message(subject, text))

    def _compare_ids(self, subject: _Subject) -> None:
        """Holds the axes of a grid against position ids, if there are any of as many tokens."""
        grid = subject.claim[0]
        for name, value in zip(self._names, self._inputs, strict=True):
            if not isinstance(value, Tensor) or not may_be_ids(name, value):
                continue
            shown = one_grid(runs_from_ids(value)) if value.shape[-2] == math.prod(grid) else None
            if shown is not None and not same_grid(shown, grid):
                text = f"the input {name} shows {times(shown)}"
                subject.failures.setdefault(None, self._message(subject, text))

    def _report(self) -> None:
        layers: dict[str, list[str]] = defaultdict(list)
        seen = {subject.place for subject in self._subjects}
        for place, (layer, _) in enumerate(self._layers):
            if place not in seen:
                layers["it did not run"].append(layer or "an attention")
        for subject in self._subjects:
            if not subject.verified:
                layers[subject.doubt].append(self._layers[subject.place][0] or "an attention")
        for doubt, names in layers.items():
            listed = ", ".join(dict.fromkeys(names))
            log.warning("the layout of %s could not be verified: %s", listed, doubt)
        verified = sum(subject.verified for subject in self._subjects)
        log.info("layouts verified on the inputs: %d of %d", verified, len(self._subjects))

    def _message(self, subject: _Subject, text: str) -> str:
        layer, source = self._layers[subject.place]
        grid, prefix = subject.claim
        suffix = subject.tokens - prefix - math.prod(grid)
        return (
            f"{layer or 'an attention'}: its {subject.tokens} tokens do not lie on the grid "
            f"{times(grid)} with prefix {prefix} and suffix {suffix} ({source}): {text}. Correct the "
            "layout that the policy or `prepare` declares, or keep the layer dense by a rule with "
            "`dense: true`; where nothing is declared, this is a fault of gna-compile to be reported"
        )

    def _name(self, index: int) -> str:
        return self._names[index]


def _changed(value: Tensor, region: _Region, seed: int) -> Tensor:
    """A copy of an input with other values in a region, about as far from the old as these differ.

    Not farther: where layers normalize, a large change of a part is as large as one of the whole.
    """
    copy = value.detach().clone()
    spread = float(value.detach().float().std())
    amount = spread / 2 if 0 < spread < math.inf else 1.0
    part = copy[tuple(slice(start, stop) for start, stop in region.bounds)]
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, part.shape, generator=generator) * 2 - 1
    part += (signs * amount).to(part)
    return copy


def _difference(before: Call, after: Call) -> Reactions:
    changes = ((new - old).norm(dim=-1) for old, new in zip(before.rows, after.rows, strict=True))
    one, other, third = (torch.nan_to_num(change, nan=0.0, posinf=0.0) for change in changes)
    return one, other, third


def _mean(draws: Sequence[Reactions]) -> Reactions:
    one, other, third = (torch.stack(same).mean(0) for same in zip(*draws, strict=True))
    return one, other, third


def _kind(subject: _Subject, reaction: Tensor, whole: Tensor) -> str:
    """What a dimension is, by the reaction to a slab across it; "" if nothing reacts.

    Args:
        whole: the reaction to a change of all of the input.
    """
    on_grid, of_all = subject.on_grid(reaction), subject.on_grid(whole)
    if on_grid.numel() == 0 or not bool(on_grid.any()):
        return ""
    felt = of_all > _MOVED / 10 * whole.max()
    if float(felt.any(0).float().mean()) < _MOST_OF_ROWS:
        return ""  # it reaches the grid from elsewhere, across an edge
    shares = torch.where(felt, on_grid / of_all, 0.0)
    moved = shares > _MOVED * shares.max()
    is_parted = not bool((moved.any(1) | ~felt.any(1)).all())
    rows = float(felt.any(0).sum())
    if float(moved.any(0).sum()) < _MOST_OF_ROWS * rows:
        faint = shares > _FAINT * shares.max()
        is_sharp = float(faint.any(0).sum()) < _MOST_OF_ROWS * rows
        return ("cut" if is_parted else "spatial") if is_sharp else "blurred"
    return "batch" if is_parted else "all"


def _trouble(subject: _Subject, cell: Sequence[int], reactions: Reactions) -> str | None:
    """What is wrong with the reactions to a change of a cell; "" if nothing is, None without any."""
    if not any(bool(reaction.any()) for reaction in reactions):
        return None
    grid, prefix = subject.claim
    row = prefix + sum(i * stride for i, stride in zip(cell, _strides(grid), strict=True))
    expected = f"row {row} was expected to react"
    for name, reaction in zip(OPERANDS, reactions, strict=True):
        strongest, of_rows = float(reaction.max()), reaction.amax(0)
        if strongest == 0:
            return f"{expected}, but none of the {name} did"
        large = of_rows >= _LARGE * strongest
        if row >= len(large) or not (bool(large[row]) or _is_blurred(subject, of_rows, row)):
            return f"{expected}, but of the {name} {_listed(large)} did"
        far = large & _is_far(subject, cell)
        if bool(far.any()):
            return f"{expected} alone, but of the {name} {_listed(far)} did, too"
    queries = reactions[0][:, row]
    for name, reaction in zip(OPERANDS[1:], reactions[1:], strict=True):
        theirs = reaction[:, row]
        if len(theirs) != len(queries):
            continue  # heads are among the batch rows of one of them
        for one, other in ((queries, theirs), (theirs, queries)):
            if bool(((one >= _LARGE * one.max()) & (other < _MOVED / 2 * other.max())).any()):
                mine, yours = (
                    _listed(x >= _LARGE * x.max(), "batch row") for x in (queries, theirs)
                )
                return f"{expected} in the same batch rows, but of the queries {mine} did, of the {name} {yours}"
    return ""


def _is_blurred(subject: _Subject, of_rows: Tensor, row: int) -> bool:
    """Whether a row is one of several cells that convolutions spread a change to."""
    strongest = of_rows.max()
    large = int((of_rows >= _LARGE * strongest).sum())
    large_on_grid = int((subject.on_grid(of_rows[None]) >= _LARGE * strongest).sum())
    return bool(of_rows[row] >= _MOVED * strongest) and large == large_on_grid


def _strides(grid: Sequence[int]) -> list[int]:
    return [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]


def _is_far(subject: _Subject, cell: Sequence[int]) -> Tensor:
    """Which rows are cells that lie too far from a cell for a convolution to mix them."""
    grid, prefix = subject.claim
    far = torch.zeros(grid, dtype=torch.bool)
    for axis, (index, length) in enumerate(zip(cell, grid, strict=True)):
        distance = (torch.arange(length) - index).abs() > max(2, -(-length // 3))
        far |= distance.reshape([-1 if i == axis else 1 for i in range(len(grid))])
    row = prefix + sum(i * stride for i, stride in zip(cell, _strides(grid), strict=True))
    rows = torch.zeros(subject.tokens, dtype=torch.bool)
    rows[prefix : prefix + far.numel()] = far.reshape(-1)
    rows[max(row - _ALONG, 0) : row + _ALONG + 1] = False  # along the sequence, too
    return rows


def _listed(rows: Tensor, what: str = "row") -> str:
    places = rows.nonzero().flatten().tolist()
    shown = ", ".join(map(str, places[:4]))
    more = f" and {len(places) - 4} others" if len(places) > 4 else ""
    return f"{what}{'s' if len(places) > 1 else ''} {shown}{more}"
