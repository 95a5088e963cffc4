"""What Inductor generates around the op: nothing is copied for it that dense attention did without."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from model_masks import POLICY
from models import Built, build
from torch._inductor.utils import run_and_get_code


def generated(built: Built, backend: str, options: dict[str, Any] | None = None) -> str:
    torch._dynamo.reset()
    run = torch.compile(built.model, backend=backend, options=options)
    return "\n".join(run_and_get_code(built.run, run)[1])


@pytest.mark.parametrize(
    "name", ["wan", *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux", "hunyuan-video"))]
)
def test_the_op_costs_no_kernels(name: str) -> None:
    """As many generated kernels and library calls as for dense attention, and no strays."""
    built = build(name)
    dense = generated(built, "inductor")
    ours = generated(built, "gna", {"policy": POLICY})
    ops = re.findall(r"= torch\.ops\.gna\.attention\.v2\((.*)", ours)
    assert ops
    for arguments in ops:  # buffers as they are, or views of them
        assert re.match(r"(buf\d+|reinterpret_tensor\(buf\d+, .*\)), ", arguments), arguments
    for pattern in (r"^ +cpp_fused\w*\(", r"extern_kernels\.", r"\.(clone|contiguous|copy_)\("):
        counts = [len(re.findall(pattern, code, re.MULTILINE)) for code in (dense, ours)]
        assert counts[1] <= counts[0], (pattern, counts)
