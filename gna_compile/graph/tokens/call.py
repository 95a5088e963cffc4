"""One operator call of a graph, as the rules see it: operands as tokens, sizes as numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from gna_compile.graph.nodes import argument_of, operator_name, tensor_of
from gna_compile.graph.tokens.cells import Source, Tokens, lattice
from gna_compile.graph.tokens.constants import Buffers, index_values
from gna_compile.graph.tokens.sizes import Sizes

Value: TypeAlias = "Tokens | list[Value] | None"
"""What is known of a value: the tokens of a tensor, a list for a tuple, None for anything else."""


class Unruled(Exception):
    """The operator is called in a form that its rule does not cover."""


class Call:
    """One node of a graph.

    Attributes:
        node: the node.
        sizes: the point at which sizes are numbers.
        makes_source: set by a rule that made a source: the next equal call makes another one.
    """

    def __init__(
        self, node: fx.Node, known: Mapping[fx.Node, Value], sizes: Sizes, buffers: Buffers
    ) -> None:
        self.node, self._known, self.sizes, self._buffers = node, known, sizes, buffers
        self.makes_source = False
        self._read: set[fx.Node] = set()

    @property
    def name(self) -> str:
        """What the operator is called in messages."""
        return operator_name(self.node) or self.node.name

    def argument(self, index: int, *names: str, default: Any = None) -> Any:
        return argument_of(self.node, index, *names, default=default)

    def tokens(self, argument: Any) -> Tokens:
        """The tokens of a tensor operand.

        Raises:
            Unruled: if it is no tensor.
        """
        value = self._known.get(argument) if isinstance(argument, fx.Node) else None
        if not isinstance(value, Tokens):
            raise Unruled
        self._read.add(argument)
        return value

    @property
    def first(self) -> Tokens:
        return self.tokens(self.argument(0, "input", "self", "x"))

    def operands(self) -> Iterator[Tokens]:
        for node in self.node.all_input_nodes:
            value = self._known.get(node)
            self._read.add(node)
            if isinstance(value, Tokens):
                yield value

    @property
    def is_unread(self) -> bool:
        """Whether the rule left out an operand that carries tokens."""
        return any(
            isinstance(value, list) or (isinstance(value, Tokens) and _has_tokens(value))
            for node in self.node.all_input_nodes
            if node not in self._read and (value := self._known.get(node)) is not None
        )

    def number(self, argument: Any) -> int:
        """An int argument."""
        if isinstance(argument, fx.Node):
            argument = argument.meta.get("example_value")
        if isinstance(argument, bool) or not isinstance(argument, int | torch.SymInt):
            raise Unruled
        return self.sizes.of(argument)

    def dim(self, argument: Any, rank: int) -> int:
        """A dimension's index, counted from the front."""
        index = self.number(argument)
        if not -rank <= index < max(rank, 1):
            raise Unruled
        return index % rank if rank else 0

    def dims(self, argument: Any, rank: int) -> tuple[int, ...]:
        items = argument if isinstance(argument, list | tuple) else (argument,)
        return tuple(self.dim(item, rank) for item in items)

    def rest(self, start: int, *names: str) -> tuple[Any, ...]:
        """Trailing arguments, given one by one or as one sequence."""
        values = self.node.args[start:]
        if not values:
            found = next((self.node.kwargs[name] for name in names if name in self.node.kwargs), ())
            values = (found,)
        if len(values) == 1 and isinstance(values[0], list | tuple):
            values = tuple(values[0])
        return tuple(values)

    def index(self, argument: Any) -> npt.NDArray[np.int64] | None:
        """The values of an index tensor; None if they depend on data."""
        if not isinstance(argument, fx.Node):
            return None
        self._read.add(argument)
        return index_values(argument, self.sizes, self._buffers)

    @property
    def result(self) -> tuple[int, ...]:
        """The result's shape."""
        tensor = tensor_of(self.node)
        if tensor is None:
            raise Unruled
        return self.sizes.shape(tensor)

    @property
    def results(self) -> list[tuple[int, ...]]:
        """The shapes of a result that is several tensors."""
        pieces = self.node.meta.get("example_value")
        if not isinstance(pieces, list | tuple):
            raise Unruled
        if not all(isinstance(piece, torch.Tensor) for piece in pieces):
            raise Unruled
        return [self.sizes.shape(piece) for piece in pieces]

    def opaque(self, operands: Sequence[Tokens], shape: tuple[int, ...]) -> Tokens:
        """A tensor of which only the origins are known."""
        roots = frozenset(root for tokens in operands for root in tokens.roots)
        if not roots or 0 in shape:
            return Tokens(shape, {})
        self.makes_source = True
        return lattice(Source(self.name, "opaque", shape, roots))

    def stem(self, old: Source, extents: tuple[int, ...]) -> Source:
        """A new lattice made of an old one by this call."""
        self.makes_source = True
        kind: Literal["opaque", "stem"] = "opaque" if old.kind == "opaque" else "stem"
        return Source(self.name, kind, extents, old.all_roots)


def tokens_in(values: Iterable[Value]) -> Iterable[Tokens]:
    for value in values:
        if isinstance(value, Tokens):
            yield value
        elif isinstance(value, list):
            yield from tokens_in(value)


def are_equal(one: Tokens, other: Tokens) -> bool:
    if one is other:
        return True
    if one.shape != other.shape or one.cells.keys() != other.cells.keys():
        return False
    return all(
        (a is None and b is None)
        or (a is not None and b is not None and a.shape == b.shape and bool((a == b).all()))
        for source, axes in one.cells.items()
        for a, b in zip(axes, other.cells[source], strict=True)
    )


def _has_tokens(tokens: Tokens) -> bool:
    return any(source.kind != "table" for source in tokens.cells)


Rule = Callable[[Call], Value]
RULES: dict[str, Rule] = {}
PARTIAL: set[str] = set()


def rule(*names: str, partial: bool = False) -> Callable[[Rule], Rule]:
    """Registers the rule of the operators that `operator_name` calls so.

    Args:
        *names: of the operators.
        partial: operands that the rule does not read do not reach the result: only their shape
            matters, or they only weigh what does. Any other rule has to read all of them.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
            if partial:
                PARTIAL.add(name)
        return function

    return register
