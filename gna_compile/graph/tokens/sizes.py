"""Symbolic sizes at a point: what number each symbol stands for.

A graph with symbolic sizes is walked at two points: at the sizes of the example inputs, and at a
generic one, where every symbol is a number of its own. What holds at one only is a coincidence of
the example's sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from gna_compile import _torch
from gna_compile.graph.symbols import Size

_UNBACKED = 5  # what a data-dependent size is taken for; such sites are never rewritten


class Sizes:
    """Numbers for the symbols of a graph; for the hints of the example inputs if none are given."""

    def __init__(self, values: dict[sympy.Symbol, int] | None = None) -> None:
        self._values = values
        self._known: dict[Any, tuple[Any, int]] = {}

    def of(self, size: Any) -> int:
        """The number that a size is here.

        Raises:
            ValueError: if it is none, because a symbol of it has no value or it is no integer here.
        """
        if isinstance(size, int):
            return size
        expression = _torch.expression(size)
        found = self._known.get(expression)
        if found is None:
            found = self._known[expression] = size, self._evaluated(size, expression)
        return found[1]

    def coincidences(self, other: Sizes) -> list[tuple[Any, int]]:
        """Symbolic sizes that were asked for and are one number at both points, with that number."""
        return [
            (size, value)
            for expression, (size, value) in self._known.items()
            if expression in other._known and other._known[expression][1] == value
        ]

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """A tensor's shape in numbers."""
        return tuple(map(self.of, tensor.shape))

    def _evaluated(self, size: Any, expression: Any) -> int:
        if self._values is None:
            hint = _torch.hint(size)
            return int(hint) if hint is not None else _UNBACKED
        value = expression.xreplace(
            {s: sympy.Integer(self._values.get(s, _UNBACKED)) for s in expression.free_symbols}
        )
        if not value.is_integer or not value.is_number:
            raise ValueError(f"{expression} is no integer here")
        return int(value)


def symbolic_sizes(gm: fx.GraphModule) -> list[torch.SymInt]:
    """All symbolic sizes of tensors, and symbolic numbers, of a graph and its subgraphs; each once."""
    found: dict[Any, torch.SymInt] = {}
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            for size in _sizes_in(node.meta.get("example_value")):
                found.setdefault(_torch.expression(size), size)
    return list(found.values())


def _sizes_in(value: Any) -> Iterable[torch.SymInt]:
    if isinstance(value, torch.SymInt):
        yield value
    elif isinstance(value, torch.Tensor):
        for size in value.shape:
            if isinstance(size, torch.SymInt):
                yield size
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _sizes_in(item)


def generic_point(sizes: Sequence[torch.SymInt]) -> Sizes:
    """A point where every symbol is small, a number of its own, and divides where sizes divide.

    Symbols that guards hold equal to others follow them.
    """
    divisors: dict[sympy.Symbol, int] = {}
    hints: dict[sympy.Symbol, int] = {}
    for size in sizes:
        expression = _torch.expression(size)
        if expression.is_Symbol:
            hints[expression] = _torch.hint(size)
        numbers = [int(n) for n in expression.atoms(sympy.Integer) if 1 < abs(int(n)) <= 64]
        factor = math.lcm(*(abs(n) for n in numbers)) if expression.atoms(sympy.Function) else 1
        for symbol in expression.free_symbols:
            divisors[symbol] = math.lcm(divisors.get(symbol, 1), min(factor, 2**12))
    dependent = _dependent(sizes, set(divisors))
    values: dict[sympy.Symbol, int] = {}
    primes = iter(sympy.sieve)
    next(primes)  # 2 divides too much
    for symbol in sorted(divisors.keys() - dependent.keys(), key=str):
        value = divisors[symbol] * next(primes)
        while value == hints.get(symbol):
            value = divisors[symbol] * next(primes)
        values[symbol] = value
    for symbol, expression in dependent.items():
        value = expression.xreplace({s: sympy.Integer(n) for s, n in values.items()})
        if value.is_Integer:
            values[symbol] = int(value)
    return Sizes(values)


def _dependent(
    sizes: Sequence[torch.SymInt], symbols: set[sympy.Symbol]
) -> dict[sympy.Symbol, Any]:
    """Symbols that guards hold equal to an expression of others, each after those it needs."""
    found: dict[sympy.Symbol, Any] = {}
    for guard in _torch.guards(sizes[0]) if sizes else ():
        if not isinstance(guard.expr, sympy.Eq):
            continue
        for symbol, expression in (guard.expr.args, reversed(guard.expr.args)):
            free = expression.free_symbols
            if symbol in symbols and free and free <= symbols - found.keys() - {symbol}:
                if symbol not in found:
                    found[symbol] = expression
                break
    return found


def pin(sizes: Iterable[torch.SymInt]) -> None:
    """Holds symbols to their values: a guard makes Dynamo recompile for others."""
    for size in sizes:
        if _torch.expression(size).is_Symbol and _torch.hint(size) is not None:
            int(size)


def matching(value: int, other: int, sizes: Iterable[torch.SymInt], generic: Sizes) -> Size | None:
    """The size that is `value` for the example inputs and `other` at the generic point."""
    if value == other:
        return value
    best: torch.SymInt | None = None
    for size in sizes:
        if _torch.hint(size) == value:
            try:
                fits = generic.of(size) == other
            except ValueError:
                continue
            if fits and (best is None or _length(size) < _length(best)):
                best = size
    return best


def _length(size: torch.SymInt) -> int:
    return len(str(_torch.expression(size)))


__all__ = ["Sizes", "generic_point", "matching", "pin", "symbolic_sizes"]
