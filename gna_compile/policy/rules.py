"""A loaded policy: which rule a layer gets, and what the rule means on a given grid.

Sizes (`tokens`, grid entries) are ints or `torch.SymInt`s. They are only compared and put through
integer arithmetic here, never converted, so a size that is symbolic in the caller stays symbolic
in the result; each comparison of one becomes a guard of the caller's graph. Sizes that depend on
data (unbacked) cannot be compared: the caller declines them first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from gna_compile.policy.errors import PolicyMismatch
from gna_compile.reasons import Reason

DEFAULT_PHASE = "default"

Size = Any  # int or torch.SymInt
Window = int | Literal["full"] | Fraction  # tokens, the whole axis, or a share of it


class Parameters(NamedTuple):
    """GNA's parameters on one grid, one entry per grid axis, slowest axis first."""

    window: tuple[Size, ...]
    stride: tuple[Size, ...]
    dilation: tuple[Size, ...]
    causal: tuple[bool, ...]


@dataclass(frozen=True)
class LayerFacts:
    """What is known of one attention layer when its rule is looked up.

    Args:
        name: fully qualified name of the module, "" if unknown.
        classes: class names of the modules around the attention, in any order.
        tokens: all tokens of the site, global ones included (int or SymInt); None if unknown.
        grid: the token grid if known (ints or SymInts).
    """

    name: str
    classes: tuple[str, ...] = ()
    tokens: Size | None = None
    grid: tuple[Size, ...] | None = None


@dataclass(frozen=True)
class DeclaredLayout:
    """A `layout` of the policy.

    Where position ids stand in for a policy's layout, sizes may be symbolic.

    Attributes:
        segments: from the first grid to the last: each the lengths of a grid, or a number of global
            tokens between two.
        prefix, suffix: global tokens before and after them; None where it does not say.
    """

    segments: tuple[Size | tuple[Size, ...], ...]
    prefix: int | None = None
    suffix: int | None = None

    @classmethod
    def of_grid(
        cls, grid: Sequence[Size], prefix: int | None = None, suffix: int | None = None
    ) -> DeclaredLayout:
        """One grid."""
        return cls((tuple(grid),), prefix, suffix)

    @property
    def grids(self) -> tuple[tuple[Size, ...], ...]:
        return tuple(segment for segment in self.segments if isinstance(segment, tuple))

    @property
    def grid(self) -> tuple[Size, ...]:
        """The largest grid, the first of equal ones."""
        return max(self.grids, key=math.prod)

    @property
    def tokens(self) -> Size:
        """Tokens from the first grid to the last."""
        sizes = (math.prod(s) if isinstance(s, tuple) else s for s in self.segments)
        return sum(sizes)


@dataclass(frozen=True)
class Phase:
    """A named stretch of a run; `first` of every `of` steps if the policy says so, else None."""

    name: str
    first: int | None = None
    of: int | None = None


@dataclass(frozen=True)
class Rule:
    """One rule of a policy: what it matches, and its effect.

    Fields of the policy that a rule may override (`layout`, `global_tokens`, `key_mask`) hold the
    value that applies to this rule. `where` is `file:line`, for reports.
    """

    index: int
    where: str = field(compare=False)
    layers: tuple[str, ...] = ()
    indices: tuple[tuple[int, int], ...] = ()
    modules: tuple[str, ...] = ()
    min_tokens: int | None = None
    max_tokens: int | None = None
    grid_rank: int | None = None
    phases: tuple[str, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    dense: bool = False
    window: Window | tuple[Window, ...] | None = None
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    base_grid: tuple[int | Literal["full"], ...] | None = None
    grids: str | int = "all"
    between_grids: str = "full"
    layout: DeclaredLayout | None = None
    global_tokens: str | None = None
    key_mask: str | None = None

    @property
    def rank(self) -> int | None:
        """How many axes the parameters are written for; None if each is one value for all axes."""
        for values in (self.window, self.stride, self.dilation, self.causal, self.base_grid):
            if isinstance(values, tuple):
                return len(values)
        return None

    @property
    def is_conditional(self) -> bool:
        """Whether the rule depends on more than the layer's name and classes."""
        sized = self.min_tokens is not None or self.max_tokens is not None
        return sized or self.grid_rank is not None or bool(self.phases) or bool(self.heads)

    def covers_head(self, head: int) -> bool:
        """Whether a head falls under the rule."""
        return not self.heads or any(low <= head <= high for low, high in self.heads)

    def chosen_grids(self, grids: Sequence[tuple[Size, ...]]) -> frozenset[int]:
        """Which of a layout's grids get the rule's windows; the others are left full.

        Raises:
            PolicyMismatch: (layout-mismatch) if the rule names a grid that there is not.
        """
        if self.grids == "all":
            return frozenset(range(len(grids)))
        if self.grids == "largest":
            tokens = [math.prod(grid) for grid in grids]
            return frozenset({max(range(len(grids)), key=lambda place: (tokens[place], -place))})
        place = {"first": 0, "last": len(grids) - 1}.get(str(self.grids), self.grids)
        if not isinstance(place, int) or place >= len(grids):
            raise PolicyMismatch(
                Reason.LAYOUT_MISMATCH,
                f"the rule is for grid {place}, counted from 0, and there are {len(grids)}",
            )
        return frozenset({place})

    def matches_module(self, name: str, classes: Sequence[str]) -> bool:
        """Whether a module of this fully qualified name and these classes can fall under the rule."""
        if self.layers and not any(_covers(glob, name) for glob in self.layers):
            return False
        if self.indices:
            index = layer_index(name)
            if index is None or not any(low <= index <= high for low, high in self.indices):
                return False
        if self.modules:
            return any(fnmatchcase(cls, glob) for glob in self.modules for cls in classes)
        return True

    def matches_sizes(self, tokens: Size | None, grid: tuple[Size, ...] | None) -> bool:
        """Whether a site of these sizes falls under the rule; unknown sizes meet no condition."""
        if self.min_tokens is not None and (tokens is None or tokens < self.min_tokens):
            return False
        if self.max_tokens is not None and (tokens is None or tokens > self.max_tokens):
            return False
        if self.grid_rank is not None:
            grid = self.layout.grid if self.layout else grid
            return grid is not None and len(grid) == self.grid_rank
        return True

    def parameters(self, grid: Sequence[Size]) -> Parameters:
        """GNA's parameters on `grid`: ints or SymInts, always legal, one entry per grid axis.

        Leading axes of static length 1 that the rule has no entries for (a video model on one
        image) are left whole. See `docs/policy.md` for how shares and base grids are rounded.

        Raises:
            PolicyMismatch: (layout-mismatch) if the rule is for another number of axes;
                (window-exceeds-grid) if a window times its dilation is larger than its axis.
            ValueError: for a dense rule.
        """
        if self.window is None:
            raise ValueError(f"rules[{self.index}] is dense and has no window")
        units = _unit_axes(grid)
        rank = self.rank
        if rank is None:
            rank = max(len(grid) - units, 1)
        missing = len(grid) - rank
        if not 0 <= missing <= units or len(grid) > 3:
            raise PolicyMismatch(
                Reason.LAYOUT_MISMATCH,
                f"the rule is for {rank} axes, the token grid {_times(grid)} has {len(grid)}",
            )
        axes = [(1, 1, 1, False)] * missing
        columns = (self.window, self.stride, self.dilation, self.causal, self.base_grid)
        for axis, values in enumerate(
            zip(*(_spread(column, rank) for column in columns), strict=True)
        ):
            try:
                axes.append(_on_axis(grid[missing + axis], *values))
            except PolicyMismatch as error:
                raise PolicyMismatch(error.reason, f"axis {missing + axis}: {error}") from None
        return Parameters(*zip(*axes, strict=True))


@dataclass(frozen=True, eq=False)
class Policy:
    """A validated policy. Immutable; equal to another iff the fingerprints are.

    Attributes:
        name: for people; the file's stem unless the file has a `name`.
        fingerprint: sha256 (hex) of the validated content, without name, comments and spelling.
        phases: phase names, "default" first, then as declared.
        source: path of the file; None for a dict.
        min_tokens: sites with fewer tokens stay dense.
        min_speedup: sites with a smaller predicted speedup over dense attention stay dense.
    """

    name: str
    fingerprint: str
    rules: tuple[Rule, ...]
    phase_steps: tuple[Phase, ...] = ()
    source: str | None = None
    min_tokens: int = 0
    min_speedup: float = 1.0
    allow_slow_providers: bool = False
    layout: DeclaredLayout | None = None
    global_tokens: str | None = None
    key_mask: str | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def phases(self) -> tuple[str, ...]:
        return (DEFAULT_PHASE, *(phase.name for phase in self.phase_steps))

    def signature(self, name: str, classes: Sequence[str] = ()) -> tuple[int, ...]:
        """Indices of the rules that a module can fall under, in order; small and hashable.

        Modules of equal signature get equal rules in every phase, given equal tokens and grid.
        Rules behind the first one that matches whatever the sizes and phase are left out.
        """
        candidates = []
        for rule in self.rules:
            if rule.matches_module(name, classes):
                candidates.append(rule.index)
                if not rule.is_conditional:
                    break
        return tuple(candidates)

    def rule_for(
        self,
        layer: LayerFacts,
        phase: str = DEFAULT_PHASE,
        candidates: Sequence[int] | None = None,
    ) -> Rule | None:
        """The first rule that matches, for some head at least, or None.

        Args:
            candidates: a `signature` taken earlier; then the layer's name and classes, which may
                be gone by now, are not looked at.

        Raises:
            ValueError: if the policy has no such phase.
        """
        return next(self._matching(layer, phase, candidates), None)

    def rules_of_heads(
        self, layer: LayerFacts, heads: Size, phase: str = DEFAULT_PHASE
    ) -> tuple[tuple[Size, Rule | None], ...]:
        """The first rule that matches each head of a layer, by groups of consecutive heads.

        Args:
            heads: of the layer; a symbol is held to its value only where a rule names heads.

        Returns:
            for each group, in order, how many heads it has and their rule, None if none matches.

        Raises:
            ValueError: if the policy has no such phase.
        """
        rules = self._up_to_all_heads(layer, phase)
        if not any(rule.heads for rule in rules):
            return ((heads, rules[0] if rules else None),)
        groups: list[tuple[int, Rule | None]] = []
        for head in range(int(heads)):
            own = next((rule for rule in rules if rule.covers_head(head)), None)
            if groups and groups[-1][1] is own:
                groups[-1] = groups[-1][0] + 1, own
            else:
                groups.append((1, own))
        return tuple(groups)

    def names_heads(self, layer: LayerFacts, phase: str = DEFAULT_PHASE) -> bool:
        """Whether a rule that a layer can fall under is for some of its heads."""
        return any(rule.heads for rule in self._up_to_all_heads(layer, phase))

    def _up_to_all_heads(self, layer: LayerFacts, phase: str) -> list[Rule]:
        """The rules that match, up to the first one for all heads."""
        rules: list[Rule] = []
        for rule in self._matching(layer, phase):
            rules.append(rule)
            if not rule.heads:
                break
        return rules

    def _matching(
        self, layer: LayerFacts, phase: str, candidates: Sequence[int] | None = None
    ) -> Iterator[Rule]:
        """The rules that match, for some head at least, in order."""
        if phase not in self.phases:
            raise ValueError(f"policy {self.name!r} has no phase {phase!r}; it has {self.phases}")
        if candidates is None:
            candidates = self.signature(layer.name, layer.classes)
        for index in candidates:
            rule = self.rules[index]
            if rule.phases and phase not in rule.phases:
                continue
            if rule.matches_sizes(layer.tokens, layer.grid):
                yield rule

    def phase_at(self, step: int, steps: int) -> str:
        """The phase of step `step` (from 0) of a run of `steps` steps.

        `{first: 9, of: 28}` covers the first 9 of 28 steps; on a run of another length the same
        share of it, rounded up. The first declared phase that covers the step wins; steps that
        none covers are in the default phase.
        """
        for phase in self.phase_steps:
            if phase.first is None or phase.of is None:
                continue
            if step < -(-phase.first * steps // phase.of):
                return phase.name
        return DEFAULT_PHASE

    def check(self, grid: Sequence[int]) -> list[str]:
        """What is wrong with the policy on this token grid, one line per problem; empty if nothing.

        A rule whose `grid_rank` is another one is not meant for the grid and passes.
        """
        problems, final = [], None
        for rule in self.rules:
            place = f"{rule.where}: rules[{rule.index}]"
            if final is not None:
                problems.append(
                    f"{place}: is never reached, since rules[{final}] matches every layer"
                )
            if not (rule.layers or rule.indices or rule.modules or rule.is_conditional):
                final = rule.index if final is None else final
            if rule.dense or rule.grid_rank not in (None, len(grid)):
                continue
            if rule.layout and tuple(grid) not in rule.layout.grids:
                declared = " + ".join(map(_times, rule.layout.grids))
                problems.append(
                    f"{place}.layout: the grid is declared as {declared}, not {_times(grid)}"
                )
                continue
            try:
                parameters = rule.parameters(grid)
            except PolicyMismatch as error:
                problems.append(f"{place}.window: {error}")
                continue
            if parameters.window == tuple(grid) and not any(parameters.causal):
                problems.append(f"{place}.window: covers the whole grid, which is dense attention")
        return problems


def layer_index(name: str) -> int | None:
    """The first part of a fully qualified name that is a number: 11 for `transformer_blocks.11.attn1`."""
    return next((int(part) for part in name.split(".") if part.isascii() and part.isdigit()), None)


def _covers(glob: str, name: str) -> bool:
    return any(fnmatchcase(run, glob) for run in _runs(name))


@lru_cache(maxsize=4096)
def _runs(name: str) -> tuple[str, ...]:
    """Every run of whole parts of a fully qualified name: a glob may start and end at any dot."""
    parts = name.split(".")
    count = len(parts)
    return tuple(
        ".".join(parts[first:stop])
        for first in range(count)
        for stop in range(first + 1, count + 1)
    )


def _on_axis(
    length: Size, window: Window, stride: int, dilation: int, causal: bool, base: int | str | None
) -> tuple[Size, Size, Size, bool]:
    """Window, stride, dilation and causal on one axis of `length` tokens."""
    if window == "full":
        return length, 1, 1, causal  # every query sees every key: a stride would change nothing
    keys: Size
    if isinstance(window, Fraction):
        keys = _at_least_one(length * window.numerator // window.denominator)
        stride = min(stride, keys)
    elif isinstance(base, int):
        keys = _at_least_one(_rounded(window * length, base))
        stride = _at_least_one(_rounded(stride * length, base))
    else:
        if window * dilation > length:
            raise PolicyMismatch(
                Reason.WINDOW_EXCEEDS_GRID,
                f"window {window}"
                + (f" x dilation {dilation} = {window * dilation}" if dilation > 1 else "")
                + f" is larger than the grid's {length} tokens",
            )
        return window, stride, dilation, causal
    if dilation > 1:
        dilation = min(dilation, length // keys)
    return keys, stride, dilation, causal


def _rounded(numerator: Size, denominator: int) -> Size:
    """The nearest integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _at_least_one(value: Size) -> Size:
    return value if value >= 1 else 1


def _spread(values: Any, rank: int) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,) * rank


def _unit_axes(grid: Sequence[Size]) -> int:
    """How many leading axes have static length 1; asking a symbol would install a guard."""
    for count, length in enumerate(grid):
        if not (isinstance(length, int) and length == 1):
            return count
    return len(grid)


def _times(grid: Sequence[Size]) -> str:
    return "x".join(str(length) for length in grid)
