"""Products of two tensors in a graph: of queries and keys, of weights and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from gna_compile.graph.mutation import written_by
from gna_compile.graph.nodes import argument_of, operator_name, tensor_of
from gna_compile.graph.scalars import constant
from gna_compile.graph.symbols import Size


@dataclass
class Operand:
    """One factor of a product: [.., rows, columns], or [.., columns, rows] if `transposed`."""

    node: fx.Node
    transposed: bool = False
    aligned: bool = True  # its batch dimensions are those of the product, in order


@dataclass
class Product:
    """A batched matrix product seen as [.., rows, inner] · [.., inner, columns]."""

    node: fx.Node
    left: Operand  # [.., rows, inner]
    right: Operand  # [.., inner, columns]
    inner: Size
    in_order: bool = True  # its value is [batch dimensions.., rows, columns]
    columns_last: bool = True  # its value is [.., columns]
    alpha: float | None = 1.0  # None: unknown
    added: fx.Node | None = None


def product_of(node: fx.Node) -> Product | None:
    """`node` as a product of two tensors of three or more dimensions, or None."""
    if tensor_of(node) is None or node.kwargs.get("out") is not None or written_by(node):
        return None
    name = operator_name(node)
    if name == "einsum":
        return _einsum(node)
    alpha: float | None = 1.0
    added = None
    if name == "matmul":
        left = argument_of(node, 0, "input", "self")
        right = argument_of(node, 1, "other", "mat2")
    elif name == "baddbmm":
        left = argument_of(node, 1, "batch1")
        right = argument_of(node, 2, "batch2")
        alpha = constant(argument_of(node, 4, "alpha", default=1))
        if constant(argument_of(node, 3, "beta", default=1)) != 0:
            added = argument_of(node, 0, "input", "self")
    else:
        return None
    one, other = tensor_of(left), tensor_of(right)
    if one is None or other is None or one.dim() < 3 or other.dim() < 3:
        return None
    return Product(node, Operand(left), Operand(right), one.shape[-1], alpha=alpha, added=added)


def _einsum(node: fx.Node) -> Product | None:
    equation = argument_of(node, 0, "equation")
    operands = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    tensors = [tensor_of(operand) for operand in operands]
    letters = _letters(equation, [-1 if t is None else t.dim() for t in tensors])
    if letters is None:
        return None
    (one, other), out = letters
    inner = set(one) & set(other) - set(out)
    batch = set(one) & set(other) & set(out)
    free = [letter for letter in out if letter not in batch]
    if len(inner) != 1 or len(free) != 2 or len(batch) + 2 != len(one) or len(one) != len(other):
        return None
    (d,) = inner
    row, column = free
    if row in other:
        one, other = other, one
        operands, tensors = operands[::-1], tensors[::-1]
    if row not in one or column not in other:
        return None
    order = "".join(letter for letter in out if letter in batch)

    def operand(index: int, text: str, rows: str, columns: str) -> Operand:
        source = operands[index]
        assert isinstance(source, fx.Node)
        aligned = text in (order + rows + columns, order + columns + rows)
        return Operand(source, text.index(columns) < text.index(rows), aligned)

    first = tensors[0]
    assert first is not None
    return Product(
        node,
        left=operand(0, one, row, d),
        right=operand(1, other, d, column),
        inner=first.shape[one.index(d)],
        in_order=out == order + row + column,
        columns_last=out[-1] == column,
    )


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """Index letters of both operands and of the output, with `...` spelled out."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    spelled = []
    dots = ""
    for term, rank in zip(terms, ranks, strict=True):
        spare = rank - len(term.replace("...", ""))
        if rank < 3 or not 0 <= spare <= 9 or (spare > 0 and "..." not in term):
            return None
        dots = "123456789"[:spare] if "..." in term else dots
        spelled.append(term.replace("...", dots))
    out = out.replace("...", dots)
    if any(len(set(term)) != len(term) for term in (*spelled, out)) or len(out) < 3:
        return None
    return spelled, out


def turned(operand: Operand) -> Operand:
    """The right factor of the scores, [.., D, T], as the keys [.., T, D]."""
    return Operand(operand.node, not operand.transposed, operand.aligned)
