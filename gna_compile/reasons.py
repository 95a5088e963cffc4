"""Why an attention site stays dense: the stable codes that reports, logs and tests use."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Reason(str, Enum):
    """A reason code; `Reason.MASK.value` is the string in reports, `.meaning` explains it."""

    meaning: str

    def __new__(cls, code: str, meaning: str) -> Reason:
        member = str.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    MASK = (
        "mask",
        "the site has an attention mask that is not proven to hide padded text only, and that the policy "
        "does not declare as `key_mask: global_tokens`",
    )
    DROPOUT = "dropout", "attention dropout is active"
    CAUSAL = (
        "causal",
        "causal attention is rewritten only on a one-dimensional grid without global tokens, by a rule with `causal: true`",
    )
    CROSS_ATTENTION = "cross-attention", "queries and keys are not the same tokens"
    OPAQUE = "opaque-attention", "the attention is inside one operator that the graph does not open"
    WEIGHTS_USED = (
        "weights-used",
        "the attention weights themselves are used, not only their product with the values",
    )
    SHAPE = "shape", "query, key and value do not have shapes that the op takes"
    DTYPE = (
        "dtype",
        "the element type is not fp32, fp16 or bf16, or differs between query, key and value",
    )
    HEAD_SIZE = (
        "head-size",
        "head_dim is not between 8 and 256, or differs between query, key and value",
    )
    LAYOUT_UNKNOWN = (
        "layout-unknown",
        "how the tokens lie on a grid is not visible in the graph and the policy does not say",
    )
    LAYOUT_MISMATCH = "layout-mismatch", "the declared layout does not fit the tokens"
    SECOND_DERIVATIVE = (
        "second-derivative",
        "the attention may be differentiated twice, which the op cannot be",
    )
    SHARED = (
        "shared-subgraph",
        "several layers share the subgraph, and the policy does not treat them alike",
    )
    UNBACKED = (
        "unbacked-size",
        "a size depends on data, so nothing can be decided about it when compiling",
    )
    TORCH = (
        "torch-version",
        "this version of torch lacks a private name that is needed; `gna doctor` lists them",
    )
    HEADS = "head-groups", "the policy's rules for the heads of this layer do not fit together"
    NO_RULE = "no-rule", "no rule of the policy matches this layer"
    RULE_DENSE = "rule-dense", "the first matching rule says dense"
    TOO_FEW_TOKENS = "too-few-tokens", "fewer tokens than the policy's `min_tokens`"
    WINDOW_EXCEEDS_GRID = (
        "window-exceeds-grid",
        "a window (times its dilation) is larger than its axis",
    )
    WINDOW_COVERS_GRID = (
        "window-covers-grid",
        "the window is the whole grid, which is dense attention",
    )
    NO_FAST_PROVIDER = "no-fast-provider", "no provider for this device takes the problem"
    SLOWDOWN = "predicted-slowdown", "the predicted speedup is below the policy's `min_speedup`"


class Decline(NamedTuple):
    """A site, or its layout, that is left alone, and why.

    Attributes:
        reason: the code.
        detail: in words, with the values that decided.
    """

    reason: Reason
    detail: str
