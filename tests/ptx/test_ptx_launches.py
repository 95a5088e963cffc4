"""The provider on patterns of several grids, launches and all, with the interpreter in place of a GPU."""

from __future__ import annotations

import pattern_oracle
import pytest
import torch
from ptx import build, interpreter
from ptx.attention import ARCHITECTURES, TOLERANCE, deviation, library
from torch import Tensor

from gna_compile import planner
from gna_compile.geometry import (
    AttentionPattern,
    GlobalTokens,
    GridTokens,
    HeadGroup,
    Segment,
    Window,
    canonical,
    default_links,
)
from gna_compile.providers import Forward, Inputs, Problem
from gna_compile.providers.cuda import provider as cuda
from gna_compile.providers.cuda.launches import key_masks
from gna_compile.providers.cuda.library import Library, load

pytestmark = pytest.mark.skipif(
    build.CXX is None or build.NVCC is None, reason="needs nvcc and a C++ compiler"
)

TEXT, IMAGE, REFERENCE = GlobalTokens(40), GridTokens((10, 12)), GridTokens((9, 15))
SEGMENTS: dict[str, tuple[Segment, ...]] = {
    "text first": (TEXT, IMAGE, REFERENCE),
    "text between": (IMAGE, TEXT, REFERENCE),
    "text around": (TEXT, IMAGE, GlobalTokens(7), REFERENCE, TEXT),
    "no text": (IMAGE, REFERENCE),
    "a full grid": (GridTokens((70,)), IMAGE, TEXT, REFERENCE),
}
WINDOWS = {IMAGE: Window((5, 3), (1, 3)), REFERENCE: Window((3, 7), causal=(False, True))}


def pattern_of(name: str) -> AttentionPattern:
    segments = SEGMENTS[name]
    windows = tuple(WINDOWS.get(s) for s in segments if isinstance(s, GridTokens))
    return AttentionPattern(segments, segments, default_links(segments), (HeadGroup(2, windows),))


@pytest.fixture(params=list(ARCHITECTURES))
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> cuda.NativeCuda:
    """Of an architecture, its library being bound to the interpreter."""
    name = request.param
    library(name)
    loaded = load(build.kernels(build.ROOT / "csrc" / name, ARCHITECTURES[name][0]))
    assert isinstance(loaded, Library), loaded

    def registered(*arguments: object) -> list[Tensor | None]:
        masks = list(key_masks(*arguments))  # type: ignore[arg-type]
        for mask in masks:
            if mask is not None:
                interpreter.register(mask)
        return masks

    monkeypatch.setattr(cuda, "library", lambda _: loaded)
    monkeypatch.setattr(cuda, "key_masks", registered)
    monkeypatch.setattr(cuda, "_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of the CPU's
    interpreter.configure(0, 2, ARCHITECTURES[name][1])
    return cuda.NativeCuda(planner.ARCHITECTURES[name])


@pytest.mark.parametrize("masks_keys", [False, True])
@pytest.mark.parametrize("name", list(SEGMENTS))
def test_several_grids(provider: cuda.NativeCuda, name: str, masks_keys: bool) -> None:
    pattern, dtype = pattern_of(name), [torch.bfloat16, torch.float16][masks_keys]
    generator = torch.Generator().manual_seed(len(name))

    def tensor(heads: int) -> Tensor:
        sizes = (2, pattern.key_tokens, heads, 64)
        return torch.randn(sizes, generator=generator).to(dtype).transpose(1, 2)

    query, key, value = tensor(2), tensor(1), tensor(1)
    key_mask = None
    if masks_keys:
        key_mask = torch.rand((2, pattern.global_keys), generator=generator) < 0.5
        for batch, hidden in enumerate(~key_mask):
            for column in hidden.nonzero().flatten()[:1]:
                token = pattern_oracle.global_keys(pattern)[column]
                value[batch, :, token] = torch.nan  # so that the fallback runs
    results = Forward(
        torch.full_like(query, torch.nan), torch.full((2, 2, query.shape[2]), torch.nan)
    )
    for x in (query, key, value):
        interpreter.register(x)
    for x in results:
        interpreter.register(x, writable=True)
    strides = query.stride(), key.stride(), value.stride()
    problem = Problem("cuda", dtype, 2, 2, 1, 64, canonical(pattern), masks_keys, *strides)
    assert provider.declines(problem) is None
    provider.forward(problem, Inputs(query, key, value, key_mask, 0.125), results)
    expected = pattern_oracle.attention(
        query, key, value.nan_to_num(0), pattern=pattern, key_mask=key_mask
    )
    assert deviation(results.output, expected[0]) < TOLERANCE[dtype][0]
    assert float((results.logsumexp - expected[1]).abs().max()) < TOLERANCE[dtype][1]
