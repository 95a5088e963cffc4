"""The ops' schemas, and their arguments by what they are about.

The overload name is the version of the schema *and* of the autograd formula: compiled graphs are
cached by the op's name, so a changed formula under an old name would meet cache entries of the old
one.

Shapes throughout: query and output [B, H, N, D], key and value [B, Hkv, N, D] with Hkv dividing H,
logsumexp [B, H, N], key_mask [B, prefix + suffix], N = prefix + product of grid + suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gna_compile import _torch
from gna_compile.providers import Forward, Inputs, OutputGradients

_torch.require("op")

_GEOMETRY = (
    "SymInt[] grid, SymInt[] window, SymInt[] stride, SymInt[] dilation, bool[] causal, "
    "SymInt prefix, SymInt suffix, Tensor? key_mask, float scale"
)
FORWARD_SCHEMA = (
    f"attention.v1(Tensor query, Tensor key, Tensor value, {_GEOMETRY}, int[] output_order, "
    'str provider="") -> (Tensor output, Tensor logsumexp)'
)
BACKWARD_SCHEMA = (
    "attention_backward.v1(Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key, "
    f"Tensor value, Tensor output, Tensor logsumexp, {_GEOMETRY}, "
    'str provider="") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)'
)
TANGENT_SCHEMA = (
    "attention_tangent.v1(Tensor tangent_query, Tensor tangent_key, Tensor tangent_value, "
    f"Tensor query, Tensor key, Tensor value, Tensor logsumexp, {_GEOMETRY}, int[] output_order) "
    "-> (Tensor tangent_output, Tensor tangent_logsumexp)"
)

LIBRARY = torch.library.Library("gna", "DEF")
for _schema in (FORWARD_SCHEMA, BACKWARD_SCHEMA, TANGENT_SCHEMA):
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

FORWARD = torch.ops.gna.attention.v1
BACKWARD = torch.ops.gna.attention_backward.v1
TANGENT = torch.ops.gna.attention_tangent.v1


class Geometry(NamedTuple):
    """The arguments that say which keys a query sees, in the schemas' order; maybe symbols."""

    grid: Sequence[int]
    window: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    causal: Sequence[bool]
    prefix: int
    suffix: int


_AXES = len(Geometry._fields)


class ForwardCall(NamedTuple):
    """The arguments of `attention`."""

    inputs: Inputs
    geometry: Geometry
    output_order: Sequence[int]
    provider: str

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> ForwardCall:
        # The dispatcher leaves out an argument that has its default.
        key_mask, scale, output_order, *provider = rest[_AXES:]
        return cls(
            Inputs(query, key, value, key_mask, scale),
            Geometry(*rest[:_AXES]),
            output_order,
            provider[0] if provider else "",
        )


class BackwardCall(NamedTuple):
    """The arguments of `attention_backward`."""

    inputs: Inputs
    forward: Forward
    given: OutputGradients
    geometry: Geometry
    provider: str

    @classmethod
    def of(cls, grad_output: Tensor, grad_logsumexp: Tensor | None, *rest: Any) -> BackwardCall:
        operands, results, rest = rest[:3], rest[3:5], rest[5:]
        key_mask, scale, *provider = rest[_AXES:]
        return cls(
            Inputs._make((*operands, key_mask, scale)),
            Forward(*results),
            OutputGradients(grad_output, grad_logsumexp),
            Geometry(*rest[:_AXES]),
            provider[0] if provider else "",
        )


class TangentCall(NamedTuple):
    """The arguments of `attention_tangent`; `moving` is `inputs` with its tensors' tangents."""

    inputs: Inputs
    moving: Inputs
    logsumexp: Tensor
    geometry: Geometry
    output_order: Sequence[int]

    @classmethod
    def of(cls, *args: Any) -> TangentCall:
        tangents, operands, logsumexp, rest = args[:3], args[3:6], args[6], args[7:]
        key_mask, scale, output_order = rest[_AXES:]
        return cls(
            Inputs._make((*operands, key_mask, scale)),
            Inputs._make((*tangents, key_mask, scale)),
            logsumexp,
            Geometry(*rest[:_AXES]),
            output_order,
        )
