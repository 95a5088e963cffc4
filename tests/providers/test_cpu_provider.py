"""The provider around the CPU kernel: the boxes it chooses, what it declines, life without it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from problems import problem

from gna_compile import _native, providers
from gna_compile.geometry import AttentionPattern, Neighborhood
from gna_compile.providers.cpu import provider as cpu
from gna_compile.providers.cpu import tiles as cpu_tiles
from gna_compile.providers.cpu.provider import Cpu
from gna_compile.providers.portable.provider import Portable

# Boxes -------------------------------------------------------------------------------------------


def test_boxes_that_divide_the_stride_visit_what_the_mask_needs() -> None:
    neighborhood = Neighborhood.of((16, 32, 32), (8, 12, 12), (4, 4, 4))
    pattern = AttentionPattern.of_neighborhood(neighborhood, 1)
    assert cpu_tiles.choose_boxes(pattern).queries == ((2, 2, 2),)
    assert cpu_tiles.pairs(pattern) == neighborhood.pairs


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
    axis = {"length": 8, "begin": 0, "end": 8, "log2_box": 4}
    axis |= {"window": 3, "stride": 1, "dilation": 1, "causal": 0}

    def native(links: tuple[int, ...] = (2,), **changes: Any) -> _native.Problem:
        """Changes of the axis, or of the problem."""
        of_axis = {name: changes.pop(name) for name in tuple(changes) if name in axis}
        queries = changes.pop("queries", [[tuple((axis | of_axis).values())]])
        keys = changes.pop("keys", [[tuple(axis.values())]])
        pattern = _native.Pattern(queries=queries, keys=keys, links=links)
        facts: dict[str, Any] = {
            "pattern": pattern,
            "type": 0,
            "sizes": (1, 2, 2, 8),
            "scale": 1.0,
            "key_mask": None,
            "threads": 1,
            "isa": "",
        }
        return _native.Problem(**(facts | changes))

    x, lse = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8)
    tensor = (x.data_ptr(), x.stride())
    changes: tuple[dict[str, Any], ...] = (
        {"type": 3},
        {"sizes": (1, 3, 2, 8)},
        {"sizes": (1, 2, 2, 2000)},
        {"window": 9},
        {"stride": 4},
        {"dilation": 3},
        {"begin": -1},
        {"begin": 8},
        {"end": 9},
        {"log2_box": 3},
        {"log2_box": 7},
        {"links": (3,)},
        {"queries": [8]},
        {"queries": [-1], "links": (1,)},
        {"queries": [1 << 30, 1], "links": (1, 1)},
        {"keys": [[(9, 0, 8, 4, 1, 1, 1, 0)]]},
        {"keys": [[(8, 0, 8, 4, 1, 1, 1, 0), (1, 0, 1, 0, 1, 1, 1, 0)]]},
        {"queries": [], "links": ()},
        {"threads": 0},
    )
    for change in changes:
        with pytest.raises(ValueError, match="does not take this problem"):
            _native.forward(native(**change), tensor, tensor, tensor, tensor, lse.data_ptr())
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        _native.forward(native(isa="mmx"), tensor, tensor, tensor, tensor, lse.data_ptr())
    with pytest.raises(ValueError, match="1 to 3 axes"):
        native(queries=[[]])
    with pytest.raises(ValueError, match="one link for each"):
        native(links=(1, 1))
    with pytest.raises(ValueError, match="does not take this pattern"):
        _native.Pattern(queries=[8], keys=[8], links=[1]).streamed(False, 0, 0, 4)


def test_fp64_goes_to_the_portable_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "PROVIDERS", [Cpu(), Portable()])
    neighborhood = Neighborhood.of((8,), (3,))
    for dtype, name in ((torch.float64, "portable"), (torch.bfloat16, "cpu")):
        chosen = providers.choose(problem(neighborhood, dtype=dtype))
        assert not isinstance(chosen, providers.Declined)
        assert chosen.name == name
