"""The ops' schemas, and their arguments by what they are about.

The overload name is the version of the schema *and* of the autograd formula: compiled graphs are
cached by the op's name, so a changed formula under an old name would meet cache entries of the old
one.

`pattern` is the list of ints of `gna_compile.geometry.encode`: which keys each query sees.

Shapes throughout: query and output [B, H, Nq, D], key and value [B, Hkv, Nk, D] with Hkv dividing H,
logsumexp [B, H, Nq], key_mask [B, global keys]; Nq, Nk, H and the global keys are the pattern's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from gna_compile import _torch
from gna_compile.providers import Forward, Inputs, OutputGradients

_torch.require("op")

_PATTERN = "SymInt[] pattern, Tensor? key_mask, float scale"
FORWARD_SCHEMA = (
    f"attention.v2(Tensor query, Tensor key, Tensor value, {_PATTERN}, int[] output_order, "
    'str provider="") -> (Tensor output, Tensor logsumexp)'
)
BACKWARD_SCHEMA = (
    "attention_backward.v2(Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key, "
    f"Tensor value, Tensor output, Tensor logsumexp, {_PATTERN}, "
    'str provider="") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)'
)
TANGENT_SCHEMA = (
    "attention_tangent.v2(Tensor tangent_query, Tensor tangent_key, Tensor tangent_value, "
    f"Tensor query, Tensor key, Tensor value, Tensor logsumexp, {_PATTERN}, int[] output_order) "
    "-> (Tensor tangent_output, Tensor tangent_logsumexp)"
)
_GRID = (
    "SymInt[] grid, SymInt[] window, SymInt[] stride, SymInt[] dilation, bool[] causal, "
    "SymInt prefix, SymInt suffix, Tensor? key_mask, float scale"
)
OLD_SCHEMAS = (
    f"attention.v1(Tensor query, Tensor key, Tensor value, {_GRID}, int[] output_order, "
    'str provider="") -> (Tensor output, Tensor logsumexp)',
    "attention_backward.v1(Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key, "
    f"Tensor value, Tensor output, Tensor logsumexp, {_GRID}, "
    'str provider="") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)',
)
"""What stored artifacts of older versions may still call."""

LIBRARY = torch.library.Library("gna", "DEF")
for _schema in (FORWARD_SCHEMA, BACKWARD_SCHEMA, TANGENT_SCHEMA):
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

FORWARD = torch.ops.gna.attention.v2
BACKWARD = torch.ops.gna.attention_backward.v2
TANGENT = torch.ops.gna.attention_tangent.v2


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        "this was compiled by an older gna-compile, whose op gna::attention.v1 is gone: compile the "
        "model again and store the artifact anew"
    )


for _schema in OLD_SCHEMAS:
    LIBRARY.define(_schema)
    LIBRARY.impl(f"gna::{_schema.split('(')[0]}", _refuse, "CompositeImplicitAutograd")


class ForwardCall(NamedTuple):
    """The arguments of `attention`."""

    inputs: Inputs
    pattern: Sequence[int]
    output_order: Sequence[int]
    provider: str

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> ForwardCall:
        # The dispatcher leaves out an argument that has its default.
        pattern, key_mask, scale, output_order, *provider = rest
        return cls(
            Inputs(query, key, value, key_mask, scale),
            pattern,
            output_order,
            provider[0] if provider else "",
        )


class BackwardCall(NamedTuple):
    """The arguments of `attention_backward`."""

    inputs: Inputs
    forward: Forward
    given: OutputGradients
    pattern: Sequence[int]
    provider: str

    @classmethod
    def of(cls, grad_output: Tensor, grad_logsumexp: Tensor | None, *rest: Any) -> BackwardCall:
        operands, results, rest = rest[:3], rest[3:5], rest[5:]
        pattern, key_mask, scale, *provider = rest
        return cls(
            Inputs._make((*operands, key_mask, scale)),
            Forward(*results),
            OutputGradients(grad_output, grad_logsumexp),
            pattern,
            provider[0] if provider else "",
        )


class TangentCall(NamedTuple):
    """The arguments of `attention_tangent`; `moving` is `inputs` with its tensors' tangents."""

    inputs: Inputs
    moving: Inputs
    logsumexp: Tensor
    pattern: Sequence[int]
    output_order: Sequence[int]

    @classmethod
    def of(cls, *args: Any) -> TangentCall:
        tangents, operands, logsumexp, rest = args[:3], args[3:6], args[6], args[7:]
        pattern, key_mask, scale, output_order = rest
        return cls(
            Inputs._make((*operands, key_mask, scale)),
            Inputs._make((*tangents, key_mask, scale)),
            logsumexp,
            pattern,
            output_order,
        )
