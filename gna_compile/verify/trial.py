"""One verification: inputs are changed part by part, and each claim is held against what reacts."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gna_compile.graph.tokens.declared import same_grid
from gna_compile.graph.tokens.layouts import times
from gna_compile.graph.tokens.position_ids import may_be_ids, one_grid, pieces_of
from gna_compile.verify.probe import OPERANDS, Probe
from gna_compile.verify.reactions import (
    ALONG_IT,
    Reactions,
    Subject,
    changed,
    difference,
    kind_of,
    mean,
    trouble_of,
)
from gna_compile.verify.ways import Dimensions, Region, Way, cells_of, ways_of

log = logging.getLogger("gna_compile")

_DRAWS = 3


class LayoutError(RuntimeError):
    """Tokens do not lie as a rewritten attention claims; raised under `verify="layouts"` only.

    The message names the layer, the claimed layout, the cell of an input that was changed, the row
    that should have reacted, those that did, and what to do.
    """


class Trial:
    """One verification."""

    def __init__(
        self,
        probe: Probe,
        layers: Sequence[tuple[str, str]],
        names: Sequence[str],
        inputs: Sequence[Any],
    ) -> None:
        self._probe, self._layers, self._names, self._inputs = probe, layers, names, inputs
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
            Subject(place, number, claim, call.rows[0].shape[1])
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

    def _react(self, region: Region, seed: int = 0) -> list[list[Reactions]]:
        """The reactions of every call to a change of a region."""
        inputs = list(self._inputs)
        inputs[region.input] = changed(self._inputs[region.input], region, seed)
        after = self._probe.run(inputs)
        return [
            [difference(old, new) for old, new in zip(before, now, strict=True)]
            for before, now in zip(self._before, after, strict=True)
        ]

    def _of(self, subject: Subject, reactions: list[list[Reactions]]) -> Reactions:
        return reactions[subject.place][subject.call]

    # --- which dimensions tokens lie along ---

    def _look_at_dimensions(self) -> None:
        for index in self._candidates:
            shape = self._inputs[index].shape
            # Some rows feel more of any change than others: what they feel of all is the measure.
            everything = self._react_often(Region(index, tuple((0, size) for size in shape)))
            kinds: dict[Subject, list[tuple[int, str]]] = defaultdict(list)
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
                spatial = tuple(dim for dim, kind in looks if kind in ALONG_IT)
                if spatial:
                    subject.shown[index] = Dimensions(
                        spatial,
                        frozenset(dim for dim, kind in looks if kind == "cut"),
                        tuple(dim for dim, kind in looks if kind == "batch"),
                        sum(kind == "all" for _, kind in looks),
                        all(kind != "blurred" for _, kind in looks),
                    )

    def _kinds(
        self,
        subject: Subject,
        reactions: list[list[Reactions]],
        everything: list[list[Reactions]],
    ) -> list[str]:
        """What a dimension is to the queries, keys and values."""
        pairs = zip(self._of(subject, reactions), self._of(subject, everything), strict=True)
        return [kind_of(subject, reaction, whole) for reaction, whole in pairs]

    def _note_moves(self, subject: Subject, index: int, kinds: Sequence[str]) -> None:
        for name, kind in zip(OPERANDS, kinds, strict=True):
            if kind:
                subject.feels[index].add(name)
            if kind in ALONG_IT:
                subject.moves[index].add(name)

    def _cut(self, index: int, dim: int, start: int) -> list[list[Reactions]]:
        """The reactions to a slab across a dimension, as thin as is felt."""
        shape = self._inputs[index].shape
        size = shape[dim]
        reactions: list[list[Reactions]] = []
        for length in dict.fromkeys((max(1, size // 64), max(1, size // 8))):
            bounds = [(0, n) for n in shape]
            bounds[dim] = (start, start + length)
            reactions = self._react_often(Region(index, tuple(bounds)))
            if any(bool(r[0].any()) for calls in reactions for r in calls):
                break
        return reactions

    def _react_often(self, region: Region) -> list[list[Reactions]]:
        """The mean reactions to several changes of a region: one alone may cancel out in a row."""
        draws = [self._react(region, seed) for seed in range(_DRAWS)]
        return [
            [mean([draw[place][number] for draw in draws]) for number in range(len(calls))]
            for place, calls in enumerate(draws[0])
        ]

    # --- whether cells move their rows ---

    def _try_ways(self) -> None:
        asked: dict[Way, list[Subject]] = defaultdict(list)
        for subject in self._subjects:
            for index, shown in subject.shown.items():
                if subject.moves[index] != set(OPERANDS):
                    continue
                shape = self._inputs[index].shape
                ways = ways_of(index, shape, subject.claim, subject.tokens, shown)
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
        for way in sorted(asked, key=Way.rank):
            self._try(way, [s for s in asked[way] if way.input not in s.passed])

    def _try(self, way: Way, subjects: list[Subject]) -> None:
        shape = self._inputs[way.input].shape
        felt: set[Subject] = set()
        for turn, cell in enumerate(cells_of(way.grid)):
            if not subjects:
                return
            region = way.region(cell, turn, shape)
            troubles: dict[Subject, str] = {}
            suspects = subjects
            # Patches may overlap: a change that their weights hardly see shows little.
            for seed, is_core in enumerate((False, True, False)):
                part = way.region(cell, turn, shape, is_core=is_core)
                reactions = self._react(part, seed)
                found = {s: trouble_of(s, cell, self._of(s, reactions)) for s in suspects}
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

    def _compare_operands(self, subject: Subject) -> None:
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

    def _compare_ids(self, subject: Subject) -> None:
        """Holds the axes of a grid against position ids, if there are any of as many tokens."""
        grid = subject.claim[0]
        for name, value in zip(self._names, self._inputs, strict=True):
            if not isinstance(value, Tensor) or not may_be_ids(name, value):
                continue
            shown = one_grid(pieces_of(value)) if value.shape[-2] == math.prod(grid) else None
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

    def _message(self, subject: Subject, text: str) -> str:
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
