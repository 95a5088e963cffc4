"""The provider around the CPU kernel: the boxes it chooses, what it declines, life without it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from problems import problem

from gna_compile import _native, providers
from gna_compile.geometry import Axis, Neighborhood
from gna_compile.providers.cpu import provider as cpu
from gna_compile.providers.cpu import tiles as cpu_tiles
from gna_compile.providers.cpu.provider import Cpu
from gna_compile.providers.portable.provider import Portable

# Boxes -------------------------------------------------------------------------------------------


def test_boxes_that_divide_the_stride_visit_what_the_mask_needs() -> None:
    neighborhood = Neighborhood.of((16, 32, 32), (8, 12, 12), (4, 4, 4))
    boxes = cpu_tiles.choose_boxes(neighborhood)
    assert boxes.queries == (2, 2, 2)
    assert cpu_tiles.pairs(neighborhood, boxes) == neighborhood.pairs


def test_streamed_counts_are_the_geometry() -> None:
    for axis in (Axis(21, 5, 3), Axis(20, 6, 2, 3), Axis(19, 4, 4, 2, True)):
        for log2_box in range(5):
            queries = keys = 0
            for index in range(axis.dilation):
                group = axis.group(index)
                for start in range(0, group.length, 2**log2_box):
                    box = range(start, min(start + 2**log2_box, group.length))
                    queries += len(group.union(box))
                    keys += len(group.seen_by(box))
            arguments = cpu_tiles.arguments(axis)
            assert _native.streamed(arguments, log2_box, False) == queries
            assert _native.streamed(arguments, log2_box, True) == keys


def test_axes_that_hide_nothing_are_joined() -> None:
    neighborhood = Neighborhood.of((4, 5, 6), (2, 5, 6), prefix=3)
    assert neighborhood.merged == Neighborhood.of((4, 30), (2, 30), prefix=3)
    dense = Neighborhood.of((4, 5, 6), (4, 5, 6))
    assert dense.merged == Neighborhood.of((120,), (120,))
    causal = Neighborhood.of((4, 5), (4, 5), causal=(False, True))
    assert causal.merged == causal


# What it declines --------------------------------------------------------------------------------


def test_supports_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    neighborhood = Neighborhood.of((8,), (3,))
    assert Cpu().supports(problem(neighborhood)) is None
    for change, reason in (
        ({"device": "cuda"}, "runs on cpu, not cuda"),
        ({"dtype": torch.float64}, "takes fp32, bf16 and fp16, not torch.float64"),
        ({"head_dim": 257}, "head_dim 257 is larger than 256"),
    ):
        assert Cpu().supports(problem(neighborhood, **change)) == reason
    monkeypatch.setattr(cpu, "_available", False)
    assert Cpu().supports(problem(neighborhood)) == "the native extension was not built"


def test_without_the_extension_the_portable_provider_serves() -> None:
    script = """
import sys
sys.modules["gna_compile._native"] = None
import torch
from gna_compile import ops, providers
from gna_compile.ops import implementations
x = torch.randn(1, 2, 30, 8)
print(ops.neighborhood_attention(x, x, x, grid=(30,), window=(5,)).shape[2])
facts = next(iter(implementations._resolved.values()))[0].problem
print(providers.choose(facts).name, "|", providers.choose(facts, name="cpu"))
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "30\nportable | cpu: the native extension was not built\n"


def test_the_kernel_refuses_what_it_cannot_take() -> None:
    def native(**changes: Any) -> _native.Problem:
        facts: dict[str, Any] = {
            "type": 0,
            "sizes": (1, 2, 2, 8),
            "axes": [(8, 3, 1, 1, False)],
            "prefix": 0,
            "suffix": 0,
            "log2_query_box": (4,),
            "log2_key_box": (4,),
            "scale": 1.0,
            "key_mask": None,
            "threads": 1,
            "isa": "",
        }
        return _native.Problem(**(facts | changes))

    x, lse = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8)
    tensor = (x.data_ptr(), x.stride())
    for change in (
        {"type": 3},
        {"sizes": (1, 3, 2, 8)},
        {"sizes": (1, 2, 2, 2000)},
        {"axes": [(8, 9, 1, 1, False)]},
        {"axes": [(8, 3, 4, 1, False)]},
        {"axes": [(8, 3, 1, 3, False)]},
        {"prefix": -1},
        {"log2_query_box": (3,)},
        {"log2_key_box": (7,)},
        {"threads": 0},
    ):
        with pytest.raises(ValueError, match="does not take this problem"):
            _native.forward(native(**change), tensor, tensor, tensor, tensor, lse.data_ptr())
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        _native.forward(native(isa="mmx"), tensor, tensor, tensor, tensor, lse.data_ptr())
    with pytest.raises(ValueError, match="1 to 3 axes"):
        native(axes=[])


def test_fp64_goes_to_the_portable_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "PROVIDERS", [Cpu(), Portable()])
    neighborhood = Neighborhood.of((8,), (3,))
    for dtype, name in ((torch.float64, "portable"), (torch.bfloat16, "cpu")):
        chosen = providers.choose(problem(neighborhood, dtype=dtype))
        assert not isinstance(chosen, providers.Declined)
        assert chosen.name == name
