"""Operators that compute: element by element, by sums of products, by attention."""

from __future__ import annotations

from functools import cache

import torch

from gna_compile import _torch
from gna_compile.graph.nodes import tensor_of
from gna_compile.graph.tokens.call import RULES, Call, Rule, Unruled, Value, rule
from gna_compile.graph.tokens.cells import Tokens, elementwise
from gna_compile.graph.tokens.movement import inserted, permuted, removed, sliced, widened
from gna_compile.graph.tokens.picking import picked
from gna_compile.graph.tokens.sums import mixed, reduced


def rule_for(name: str) -> Rule | None:
    """The rule of the operator that `operator_name` calls `name`."""
    found = RULES.get(name)
    if found is None and _is_pointwise(name):
        found = RULES[name] = pointwise
    return found


@cache
def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None) if name else None
    if not isinstance(packet, _torch.OpOverloadPacket):
        return False
    return any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


# Elementwise operators that carry no pointwise tag under this name.
@rule(
    *("and", "or", "xor", "invert", "pos", "lshift", "rshift", "floordiv", "truediv", "mod"),
    *("float_power", "floor_divide", "polar", "complex", "conj", "resolve_conj"),
    *("resolve_neg", "square", "__and__", "__or__", "__xor__", "scaled_add"),
    *(
        "masked_fill",
        "fill",
        "logical_and",
        "logical_or",
        "logical_not",
        "imod",
        "ipow",
        "ifloordiv",
        "iand",
        "ior",
    ),
)
def pointwise(call: Call) -> Value:
    return widened(elementwise(list(call.operands())), call.result)


@rule("glu")
def glu(call: Call) -> Value:
    tokens = call.first
    dim = call.dim(call.argument(1, "dim", default=-1), len(tokens.shape))
    half = tokens.shape[dim] // 2
    return elementwise([sliced(tokens, dim, i * half, (i + 1) * half) for i in range(2)])


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def running(call: Call) -> Value:
    tokens = call.first
    dim = call.dim(call.argument(1, "dim"), len(tokens.shape))
    if any(a is not None and a.shape[dim] > 1 for axes in tokens.cells.values() for a in axes):
        raise Unruled
    return tokens


@rule("linear")
def linear(call: Call) -> Value:
    return along_last(call.first, call.result)


def along_last(tokens: Tokens, shape: tuple[int, ...]) -> Tokens:
    """What a product with weights makes of the rows of a tensor."""
    return Tokens(shape, mixed(tokens, [len(tokens.shape) - 1]).cells)


@rule("matmul", "mm", "mv", "dot")
def matmul(call: Call) -> Value:
    return product(call.first, call.tokens(call.argument(1, "other", "mat2", "tensor2", "vec")))


@rule("addmm", "baddbmm", "addbmm", "addmv")
def addmm(call: Call) -> Value:
    result = product(
        call.tokens(call.argument(1, "mat1", "batch1", "mat")),
        call.tokens(call.argument(2, "mat2", "batch2", "vec")),
    )
    if result.shape != call.result:
        raise Unruled
    return elementwise([call.first, result])


def product(left: Tokens, right: Tokens) -> Tokens:
    """[.., rows, inner] times [.., inner, columns]."""
    is_row, is_column = len(left.shape) == 1, len(right.shape) == 1
    left = inserted(left, 0) if is_row else left
    right = inserted(right, 1) if is_column else right
    sum_rows = mixed if _are_weights(right, 2) else reduced
    sum_columns = mixed if _are_weights(left, 2) else reduced
    rows = sum_rows(left, [len(left.shape) - 1])
    columns = sum_columns(right, [len(right.shape) - 2])
    result = elementwise([rows, columns])
    if is_column:
        result = removed(result, [len(result.shape) - 1])
    if is_row:
        result = removed(result, [len(result.shape) - (1 if is_column else 2)])
    return result


def _are_weights(tokens: Tokens, dims: int) -> bool:
    """Whether nothing that is known of a tensor varies along its last dimensions."""
    arrays = (a for axes in tokens.cells.values() for a in axes if a is not None)
    return all(n == 1 for array in arrays for n in array.shape[len(tokens.shape) - dims :])


@rule("outer")
def outer(call: Call) -> Value:
    other = call.tokens(call.argument(1, "vec2"))
    return elementwise([inserted(call.first, 1), inserted(other, 0)])


@rule("einsum")
def einsum(call: Call) -> Value:
    equation, *operands = call.node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str):
        raise Unruled
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    tensors = [call.tokens(operand) for operand in operands]
    for i, (term, tokens) in enumerate(zip(terms, tensors, strict=True)):
        spare = len(tokens.shape) - len(term.replace("...", ""))
        terms[i] = term.replace("...", "0123456789"[10 - spare :] if spare else "")
    dots = max((t for t in terms), key=lambda t: sum(c.isdigit() for c in t))
    output = output.replace("...", "".join(c for c in dots if c.isdigit()))
    if not arrow:
        letters = "".join(terms)
        output = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    parts = []
    for term, tokens in zip(terms, tensors, strict=True):
        if len(set(term)) != len(term):
            raise Unruled  # a diagonal
        lost = [d for d, letter in enumerate(term) if letter not in output]
        others = (other for other in tensors if other is not tokens)
        by_weights = any(_are_weights(other, len(other.shape)) for other in others)
        left = removed((mixed if by_weights else reduced)(tokens, lost), lost)
        kept = [letter for letter in term if letter in output]
        turned = permuted(left, [kept.index(letter) for letter in output if letter in kept])
        for d, letter in enumerate(output):
            if letter not in kept:
                turned = inserted(turned, d)
        parts.append(turned)
    return elementwise(parts)


@rule("embedding")
def embedding(call: Call) -> Value:
    # Ids come first in one form of the call, the table in the other.
    for i, name in enumerate(("input", "weight")):
        operand = call.argument(i, name)
        tensor = tensor_of(operand)
        if tensor is not None and not tensor.dtype.is_floating_point:
            table = call.tokens(call.argument(1 - i, "weight" if i == 0 else "input"))
            found = picked(call, table, 0, operand)
            # A learned table may hold anything: what counts in it is no place.
            return Tokens(found.shape, {s: a for s, a in found.cells.items() if s.kind != "table"})
    raise Unruled


@rule(
    *("mean", "sum", "prod", "amax", "amin", "any", "all", "norm", "std", "var", "var_mean"),
    *("std_mean", "logsumexp", "argmax", "argmin", "nansum", "nanmean", "count_nonzero", "median"),
    *("linalg_vector_norm",),
)
def reduction(call: Call) -> Value:
    tokens = call.first
    rank = len(tokens.shape)
    named = call.argument(1, "dim", "axis")
    example = call.node.meta.get("example_value")
    if call.node.op == "call_function" and _is_norm(call) and "dim" not in call.node.kwargs:
        named = call.argument(2, "dim")
    dims = tuple(range(rank)) if named is None or named == () else call.dims(named, rank)
    left = reduced(tokens, dims)
    shapes = call.results if isinstance(example, list | tuple) else [call.result]
    if shapes[0] != left.shape:
        left = removed(left, dims)
    return [left] * len(shapes) if isinstance(example, list | tuple) else left


def _is_norm(call: Call) -> bool:
    return getattr(call.node.target, "__name__", "") in (
        "norm",
        "linalg_vector_norm",
        "vector_norm",
    )


@rule("max", "min")
def extremum(call: Call) -> Value:
    other = call.argument(1, "other", "dim")
    return pointwise(call) if tensor_of(other) is not None else reduction(call)


@rule("scaled_dot_product_attention", partial=True)
def attention(call: Call) -> Value:
    return attended(call.tokens(call.argument(0, "query")), call.result)


def attended(query: Tokens, shape: tuple[int, ...]) -> Tokens:
    """Attention's output: each row is its query's token; its position was for the scores only."""
    out = reduced(query, [len(query.shape) - 1])
    return Tokens(shape, {s: axes for s, axes in out.cells.items() if s.kind != "table"})


@rule("multi_head_attention_forward", partial=True)
def whole_layer(call: Call) -> Value:
    """The output of a whole attention layer, then its weights, if they are asked for."""
    query = call.tokens(call.argument(0, "query"))
    pieces = call.node.meta.get("example_value")
    if not isinstance(pieces, list | tuple):
        raise Unruled
    return [along_last(query, query.shape), *(None for _ in pieces[1:])]
