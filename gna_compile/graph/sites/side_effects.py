"""What else happens to the scores and weights of an unfused attention: uses, and writes in place."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from gna_compile.graph.mutation import shares_memory, written_by
from gna_compile.graph.nodes import argument_of, operator_name
from gna_compile.reasons import Decline, Reason

# What reads the shape or dtype of an operand, but not its values: every operand but the first, or
# the first too.
_SHAPED_LIKE = frozenset({"view_as", "reshape_as", "expand_as", "type_as"})
_SHAPE_ONLY = frozenset({"size", "dim", "numel", "stride", "zeros_like", "ones_like", "empty_like"})
_SHAPE_ONLY |= {"full_like", "new_zeros", "new_ones", "new_empty", "new_full"}
_SHAPE_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim"})


def side_effects(
    chain: list[fx.Node], node: fx.Node
) -> Iterator[tuple[fx.Node | None, Decline | None]]:
    """Uses of the scores and weights outside the chain: in-place masks, or an obstacle."""
    inside = {*chain, node}
    for link in chain:
        for user in link.users:
            if user in inside or _reads_shape_only(user, link):
                continue
            name = operator_name(user)
            mask = argument_of(user, 1, "mask", "other")
            if (
                link in written_by(user)
                and not user.users
                and name in ("masked_fill", "add", "setitem")
                and isinstance(mask, fx.Node)
            ):
                yield mask, None
            else:
                yield (
                    None,
                    Decline(
                        Reason.WEIGHTS_USED,
                        f"scores or weights are also used by `{name or user.name}` (node {user.name})",
                    ),
                )


def _reads_shape_only(user: fx.Node, node: fx.Node) -> bool:
    name = operator_name(user)
    if name == "getattr":
        return user.args[1] in _SHAPE_ATTRIBUTES
    if name in _SHAPED_LIKE:
        return argument_of(user, 0, "input", "self") is not node
    return name in _SHAPE_ONLY and not written_by(user)


def changed_links(
    chain: list[fx.Node], output: fx.Node, scores: fx.Node, masks: list[fx.Node]
) -> Decline | None:
    """Whether scores, weights or masks are overwritten in another way than by a step of the chain.

    All that uses a link of the chain was looked at before. This finds what reaches its memory by
    another tensor, such as a bias that took up the scores in place.
    """
    current = output.prev
    while current is not scores:
        for target in written_by(current):
            changed = next((n for n in (*chain, *masks) if shares_memory(target, n)), None)
            if changed is not None and target not in chain:
                return Decline(
                    Reason.WEIGHTS_USED,
                    f"{current.name} overwrites {changed.name} inside the attention",
                )
        current = current.prev
    return None
