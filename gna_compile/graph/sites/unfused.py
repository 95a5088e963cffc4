"""Matches unfused (eager) attention: scores = query·keyᵀ, softmax, weights·value.

From each softmax over the last dimension the matcher walks up to the product that made the scores
and down to the product that uses the weights. On the way it collects the scale (before, after, or
as `alpha` of baddbmm), masks and dropout, and passes casts and views. Whatever else happens to the
scores or weights becomes the match's obstacle: it is then reported, and never rewritten.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from gna_compile.graph.mutation import shares_memory, written_by
from gna_compile.graph.nodes import argument_of, operator_name, tensor_of
from gna_compile.graph.scalars import constant
from gna_compile.graph.sites.products import Operand, Product, product_of, turned
from gna_compile.graph.sites.side_effects import changed_links, side_effects
from gna_compile.graph.symbols import Size, is_known, same_shape
from gna_compile.reasons import Decline, Reason

_CASTS = frozenset({"to", "type", "type_as", "float", "double", "half", "bfloat16"})
_VIEWS = frozenset({"view", "reshape", "contiguous", "clone", "flatten", "unflatten"})
_VIEWS |= {"unsqueeze", "squeeze", "expand", "view_as", "reshape_as", "detach_copy"}
_TRANSPOSES = frozenset({"transpose", "permute", "movedim", "mT", "mH", "T", "H", "t"})
# What some models do to scores or weights besides a scale and a mask.
_ALTERATIONS = frozenset(
    {"tanh", "clamp", "clip", "clamp_min", "clamp_max", "nan_to_num", "sub", "add", "mul", "div"}
)
_ALTERATIONS |= {"neg", "abs", "relu", "sigmoid", "pow", "minimum", "maximum", "masked_fill"}
_ALTERATIONS |= {"where", "detach", "setitem", "dropout"}
_GRADIENT_MODES = ("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")
_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
_MOST_STEPS = 24


@dataclass(eq=False)
class Match:
    """Unfused (eager) attention.

    `node` is the product with the values, `scores` the product of queries and keys ([.., S, T]).
    `query`, `key` and `value` are [.., S, D], before any constant scale; `key` is [.., D, S] if
    `key_transposed`. `scale` is the product of all constant factors on the scores. `mask_form` says
    how `mask` acts: "added", "filled" (True hides), "selected" (a condition of `where`) or
    "several" (`mask` is the last of them); "" without a mask. `steps` are the tensors whose recorded
    shapes the match relies on, besides the operands.
    """

    node: fx.Node
    scores: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    key_transposed: bool
    scale: float
    mask: fx.Node | None
    mask_form: str
    dropout: float
    head_dim: Size
    obstacle: Decline | None
    steps: tuple[fx.Node, ...]


def match(softmax: fx.Node) -> Match | None:
    """The attention around a softmax, or None if the softmax is not part of one."""
    value = tensor_of(softmax)
    if value is None or operator_name(softmax) != "softmax" or softmax.kwargs.get("out"):
        return None
    source, dim = argument_of(softmax, 0, "input", "self"), argument_of(softmax, 1, "dim")
    if not isinstance(source, fx.Node) or dim not in (-1, value.dim() - 1):
        return None
    weights = _find_product(softmax)
    scores = None if weights is None else _find_scores(source)
    if scores is None or weights is None:
        return None
    return _assemble(source, scores, weights)


# --- upwards: from the softmax to the scores -----------------------------------------------------


@dataclass
class _Scores:
    product: Product
    scale: float = 1.0
    masks: list[tuple[fx.Node, str]] = field(default_factory=list)
    chain: list[fx.Node] = field(default_factory=list)  # from the product to the softmax's operand
    dropout: float = 0.0
    obstacle: Decline | None = None

    def refuse(self, reason: Reason, why: str) -> None:
        if self.obstacle is None:
            self.obstacle = Decline(reason, why)


def _find_scores(node: fx.Node, steps: int = _MOST_STEPS) -> _Scores | None:
    """Walks up from a softmax's operand to the product it comes from."""
    if steps == 0:
        return None
    product = product_of(node)
    if product is not None:
        if not product.columns_last:
            return None
        found = _Scores(product, chain=[node])
        if not product.in_order:
            found.refuse(Reason.SHAPE, "the scores are not [.., queries, keys]")
        if product.alpha is None:
            found.refuse(Reason.WEIGHTS_USED, "the scores are scaled by something not constant")
        else:
            found.scale = product.alpha
        if product.added is not None:
            found.masks.append((product.added, "added"))
        return found
    name = operator_name(node)
    if name not in _CASTS | _VIEWS | _ALTERATIONS:
        return None
    for position, above in _tensor_arguments(node):
        upper = _find_scores(above, steps - 1)
        if upper is not None:
            _apply(upper, node, name, position)
            upper.chain.append(node)
            return upper
    return None


def _tensor_arguments(node: fx.Node) -> Iterator[tuple[int, fx.Node]]:
    """Positions and nodes of the tensors that a step of the chain may continue through."""
    arguments = list(node.args)
    if not arguments:
        arguments = [argument_of(node, 0, "input", "self"), argument_of(node, 1, "other")]
    name = operator_name(node)
    # Only these have a second operand that can be the scores.
    limit = 3 if name == "where" else 2 if name in ("add", "mul") else 1
    for position, argument in enumerate(arguments[:limit]):
        if isinstance(argument, fx.Node) and tensor_of(argument) is not None:
            yield position, argument


def _apply(found: _Scores, node: fx.Node, name: str, position: int) -> None:
    """Notes what one step, with the scores as its operand at `position`, does to them."""
    if node.kwargs.get("out") is not None:
        found.refuse(Reason.WEIGHTS_USED, f"{node.name} writes the scores into another tensor")
        return
    if name in _CASTS or name in _VIEWS:
        return
    above = found.chain[-1]
    other = argument_of(node, 1 - position, "other") if position < 2 else None
    if name in ("mul", "div"):
        factor = constant(other)
        plain = node.kwargs.get("rounding_mode") is None
        if factor is not None and plain and (name == "mul" or factor != 0):
            found.scale = found.scale * factor if name == "mul" else found.scale / factor
            return
    elif name == "add" and isinstance(other, fx.Node) and tensor_of(other) is not None:
        if position == 0 or node.kwargs.get("alpha", 1) == 1:
            found.masks.append((other, "added"))
            return
    elif name == "sub" and isinstance(other, fx.Node) and tensor_of(other) is not None:
        found.masks.append((other, "added"))
        return
    elif name == "masked_fill":
        mask = argument_of(node, 1, "mask")
        if isinstance(mask, fx.Node):
            found.masks.append((mask, "filled"))
            return
    elif name == "where":
        method = node.op == "call_method"
        condition = argument_of(node, 1 if method else 0, "condition")
        if isinstance(condition, fx.Node) and condition is not above:
            found.masks.append((condition, "selected"))
            return
    elif name == "dropout":
        found.dropout = _stronger(found.dropout, _dropout(node))
        return
    found.refuse(
        Reason.WEIGHTS_USED, f"the scores go through `{name}` (node {node.name}) before the softmax"
    )


def _dropout(node: fx.Node) -> float:
    """The probability that a dropout drops: 0 if it is inactive, NaN if it cannot be told."""
    training = argument_of(node, 2, "training", "train", default=True)
    if training is False:
        return 0.0
    probability = constant(argument_of(node, 1, "p", default=0.5))
    return math.nan if probability is None else probability


def _stronger(one: float, other: float) -> float:
    """The larger of two dropout probabilities, NaN (unknown) above all."""
    return max(one, other, key=lambda p: math.inf if math.isnan(p) else p)


# --- downwards: from the softmax to the product with the values ----------------------------------


@dataclass
class _Weights:
    product: Product
    flipped: bool = False  # the weights enter as [.., T, S]
    chain: list[fx.Node] = field(default_factory=list)  # from the softmax to the product's operand
    dropout: float = 0.0
    obstacle: Decline | None = None


def _find_product(
    node: fx.Node, flipped: bool = False, steps: int = _MOST_STEPS
) -> _Weights | None:
    """Walks down from a softmax to the product that contracts its last dimension."""
    if steps == 0:
        return None
    for user in node.users:
        product = product_of(user)
        if product is not None:
            found = _weights_in(product, node, flipped)
            if found is not None:
                return found
            continue
        name = operator_name(user)
        first = argument_of(user, 0, "input", "self")
        if first is not node and name not in ("mul", "add", "where"):
            continue
        turned = _swaps_last_two(user)
        if name not in _CASTS | _VIEWS | _ALTERATIONS and not turned:
            continue
        found = _find_product(user, flipped ^ turned, steps - 1)
        if found is None:
            continue
        if name == "dropout":
            found.dropout = _stronger(found.dropout, _dropout(user))
        elif name in _ALTERATIONS or user.kwargs.get("out") is not None:
            found.obstacle = Decline(
                Reason.WEIGHTS_USED,
                f"the weights go through `{name}` (node {user.name}) after the softmax",
            )
        found.chain.insert(0, node)
        return found
    return None


def _weights_in(product: Product, node: fx.Node, flipped: bool) -> _Weights | None:
    """The product as one that sums over the keys of `node`, the weights, or None if it does not."""
    for operand, is_left in ((product.left, True), (product.right, False)):
        # The keys are the last dimension of the weights as they left the softmax.
        keys_last = not operand.transposed
        if operand.node is node and (keys_last ^ flipped) == is_left:
            found = _Weights(product, flipped, [node])
            value = product.right if is_left else product.left
            if not is_left or product.alpha != 1.0 or product.added is not None:
                found.obstacle = Decline(Reason.SHAPE, "the output is not [.., tokens, head_dim]")
            elif (
                flipped
                or operand.transposed
                or not (product.in_order and operand.aligned and value.aligned)
            ):
                found.obstacle = Decline(
                    Reason.SHAPE, "weights, values and output differ in their order"
                )
            elif value.transposed:
                found.obstacle = Decline(Reason.SHAPE, "the values are [.., head_dim, tokens]")
            return found
    return None


def _swaps_last_two(node: fx.Node) -> bool:
    """Whether a node is its operand with the last two dimensions exchanged."""
    name = operator_name(node)
    value = tensor_of(node)
    if name not in _TRANSPOSES or value is None or written_by(node):
        return False
    rank = value.dim()
    if rank < 2:
        return False
    if name == "mT":
        return True
    if name == "mH":
        return not value.is_complex()
    if name in ("T", "H", "t"):
        return rank == 2 and not value.is_complex()
    if name in ("transpose", "movedim"):
        first = argument_of(node, 1, "dim0", "axis0", "source")
        second = argument_of(node, 2, "dim1", "axis1", "destination")
        if not isinstance(first, int) or not isinstance(second, int):
            return False
        return {first % rank, second % rank} == {rank - 1, rank - 2}
    dims = argument_of(node, 1, "dims")
    order = list(dims) if isinstance(dims, list | tuple) else list(node.args[1:])
    last_swapped = [*range(rank - 2), rank - 1, rank - 2]
    return [dim % rank for dim in order if isinstance(dim, int)] == last_swapped


# --- both ----------------------------------------------------------------------------------------


@dataclass
class _Peeled:
    """An operand behind some constant scale, casts and transposes."""

    node: fx.Node
    transposed: bool
    scale: float
    reader: fx.Node  # what reads it: the step that was peeled off last, or the product


def _peel(operand: Operand, product: fx.Node, output: fx.Node) -> list[_Peeled]:
    """An operand of the scores and what is found behind it, outermost first.

    A step is peeled off only where nothing writes to its result before the product reads that, nor
    to its source from when the step read that until the output, where a rewritten site reads it.
    """
    found = [_Peeled(operand.node, operand.transposed, 1.0, product)]
    for _ in range(_MOST_STEPS):
        last = found[-1]
        node, transposed, scale = last.node, last.transposed, last.scale
        value = tensor_of(node)
        if node.op not in ("call_function", "call_method") or value is None or written_by(node):
            break
        if any(operator_name(user) in _HOOKS for user in node.users):
            break
        name = operator_name(node)
        source = argument_of(node, 0, "input", "self")
        if _swaps_last_two(node):
            transposed = not transposed
        elif name == "mul" or (name == "div" and node.kwargs.get("rounding_mode") is None):
            other = argument_of(node, 1, "other")
            factor = constant(other, pin=False)
            if factor is None and name == "mul":
                factor, source = constant(source, pin=False), other
            if factor is None or (name == "div" and factor == 0):
                break
            scale = scale * factor if name == "mul" else scale / factor
        elif name not in _CASTS and name not in ("contiguous", "clone"):
            break
        behind = tensor_of(source)
        if behind is None or behind.device != value.device or not _widens(behind, value):
            break
        if _writer_between(node, product, node) or _writer_between(node, output, source):
            break
        found.append(_Peeled(source, transposed, scale, node))
    return found


def _writer_between(start: fx.Node, end: fx.Node, tensor: fx.Node) -> fx.Node | None:
    """The last node after `start` and before `end` that writes to a tensor's memory, or None."""
    current = end.prev
    while current is not start:
        if any(shares_memory(target, tensor) for target in written_by(current)):
            return current
        current = current.prev
    return None


def _widens(narrow: torch.Tensor, wide: torch.Tensor) -> bool:
    """Whether every value of one dtype is a value of the other."""
    if narrow.dtype == wide.dtype:
        return True
    halves = (torch.float16, torch.bfloat16)
    return narrow.dtype in halves and wide.dtype in (torch.float32, torch.float64)


def _choose(peeled: list[_Peeled], dtype: torch.dtype) -> _Peeled:
    """The innermost operand that has its rows before its columns and, if possible, the dtype."""

    def rank(item: _Peeled) -> tuple[bool, bool]:
        value = tensor_of(item.node)
        return (not item.transposed, value is not None and value.dtype == dtype)

    return max(reversed(peeled), key=rank)


def _assemble(source: fx.Node, upper: _Scores, lower: _Weights) -> Match | None:
    node, scores = lower.product.node, upper.product.node
    raw, out = tensor_of(scores), tensor_of(node)
    logits, weights = tensor_of(source), tensor_of(lower.chain[-1])
    if raw is None or out is None or logits is None or weights is None:
        return None
    obstacle = upper.obstacle or lower.obstacle
    masks = list(upper.masks)
    chain = [*upper.chain, *lower.chain]

    dropout = _stronger(upper.dropout, lower.dropout)
    if dropout != 0:
        obstacle = obstacle or Decline(Reason.DROPOUT, _dropout_text(dropout))
    for mask, reason in side_effects(chain, node):
        if mask is not None:
            masks.append((mask, "filled"))
        else:
            obstacle = obstacle or reason
    if not is_known(raw.shape[-1] == logits.shape[-1]) or not (
        lower.flipped or same_shape(raw.shape, weights.shape)
    ):
        obstacle = obstacle or Decline(
            Reason.SHAPE,
            f"scores {list(raw.shape)} become weights {list(weights.shape)}",
        )

    queries, keys = upper.product.left, turned(upper.product.right)
    if not (queries.aligned and keys.aligned):
        obstacle = obstacle or Decline(
            Reason.SHAPE, "queries or keys do not have the order of the scores"
        )
    peeled = [_peel(operand, scores, node) for operand in (queries, keys)]
    query, key = (_choose(found, out.dtype) for found in peeled)
    if query.transposed:
        obstacle = obstacle or Decline(Reason.SHAPE, "the queries are [.., head_dim, tokens]")
    left, right = lower.product.left, lower.product.right
    value = right.node if left.node is lower.chain[-1] else left.node
    obstacle = obstacle or _dtype_obstacle(query.node, key.node, scores, node)
    obstacle = obstacle or _changed_before(node, (query, key))
    obstacle = obstacle or changed_links(chain, node, scores, [mask for mask, _ in masks])
    return Match(
        node=node,
        scores=scores,
        query=query.node,
        key=key.node,
        value=value,
        key_transposed=key.transposed,
        scale=upper.scale * query.scale * key.scale,
        mask=masks[-1][0] if masks else None,
        mask_form="" if not masks else masks[0][1] if len(masks) == 1 else "several",
        dropout=dropout,
        head_dim=upper.product.inner,
        obstacle=obstacle,
        steps=(*chain, *(item.node for found in peeled for item in found)),
    )


def _dropout_text(probability: float) -> str:
    if math.isnan(probability):
        return "the dropout probability is not known when compiling"
    return f"attention dropout of {probability:g} is active"


def _dtype_obstacle(query: fx.Node, key: fx.Node, scores: fx.Node, node: fx.Node) -> Decline | None:
    """Refuses to compute in another precision than the model does.

    Allowed are operands that have the output's dtype, that autocast brought to it, or that are
    narrower than it.
    """
    out, raw = tensor_of(node), tensor_of(scores)
    for operand in (query, key):
        value = tensor_of(operand)
        if value is None or out is None or raw is None:
            return Decline(Reason.DTYPE, "an operand's dtype is not known")
        if not (_widens(value, out) or raw.dtype == out.dtype):
            return Decline(
                Reason.DTYPE, f"queries and keys are {value.dtype}, the output is {out.dtype}"
            )
    return None


def _changed_before(output: fx.Node, operands: tuple[_Peeled, _Peeled]) -> Decline | None:
    """Whether the site would mean something else if it were computed at the output.

    That is where a rewritten site reads queries and keys: they must not be overwritten after the
    model read them, nor may gradients have been switched on or off in between.
    """
    for operand in operands:
        writer = _writer_between(operand.reader, output, operand.node)
        if writer is not None:
            return Decline(
                Reason.SHAPE,
                f"{writer.name} overwrites {operand.node.name} between its use and the output",
            )
    current, readers = output.prev, {operand.reader for operand in operands}
    while readers:
        if getattr(current.target, "__name__", "") in _GRADIENT_MODES:
            return Decline(
                Reason.WEIGHTS_USED, "gradients are switched on or off inside the attention"
            )
        readers.discard(current)
        current = current.prev
    return None
