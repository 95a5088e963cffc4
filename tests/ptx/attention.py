"""Our attention kernels in the interpreter: one problem, checked against float64."""

from __future__ import annotations

import ctypes
import math
import random
from ctypes import POINTER, c_char_p, c_int32, c_void_p
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import oracle
import torch
from ptx import build, interpreter
from torch import Tensor

from gna_compile.providers.cuda.library import BF16, FP16, GridAxis, NativeProblem, TensorView

ARCHITECTURES = {"sm90": ("compute_90a", (9, 0)), "sm100": ("compute_100f", (10, 0))}

# Largest ||error|| / ||expected||, and largest error of a logsumexp, as on hardware.
TOLERANCE = {torch.float16: (1.5e-3, 1e-3), torch.bfloat16: (8e-3, 1e-3)}


def library_of(name: str, host: Path | None = None) -> interpreter.Library:
    """Kernel `name` with the host code of csrc, or of another copy of it."""
    loaded = interpreter.Library(build.ROOT / "csrc" / name, ARCHITECTURES[name][0], host)
    forward = loaded.functions.gna_forward
    forward.argtypes = [POINTER(NativeProblem), *[POINTER(TensorView)] * 4, c_void_p, c_void_p]
    forward.restype = c_int32
    loaded.functions.gna_message.restype = c_char_p
    return loaded


@lru_cache
def library(name: str) -> interpreter.Library:
    return library_of(name)


@dataclass
class Attention:
    """A problem. Axes are (length, window, stride, dilation, causal, log2 of the query box and of the
    key box's extents); the boxes' logarithms add up to 7 for keys, to 7 or 8 for queries."""

    axes: list[tuple[int, int, int, int, bool, int, int]]
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    prefix: int = 0
    suffix: int = 0
    masks_keys: bool = False
    scale: float | None = None
    seed: int = 0
    layout: str = "BSHD"
    minor: int | None = None  # of the compute capability, if not the architecture's first
    global_queries: range | None = (
        None  # whose rows are asked for, over prefix, then suffix; or all
    )
    poison: dict[str, list[tuple[tuple[int, ...], float]]] = field(default_factory=dict)

    @property
    def geometry(self) -> dict[str, Any]:
        names = ("grid", "window", "stride", "dilation", "causal")
        return {name: [axis[i] for axis in self.axes] for i, name in enumerate(names)}

    @property
    def tokens(self) -> int:
        return self.prefix + math.prod(axis[0] for axis in self.axes) + self.suffix

    @property
    def asked(self) -> range:
        """The global queries whose rows are asked for."""
        every = range(self.prefix + self.suffix)
        return every if self.global_queries is None else self.global_queries

    @property
    def written(self) -> Tensor:
        """Bool [tokens]: rows of the grid, and of each tile of global queries that some are asked of."""
        tile = 1 << sum(axis[5] for axis in self.axes)
        rows = torch.zeros(self.prefix + self.suffix, dtype=torch.bool)
        rows[self.asked.start : self.asked.stop] = True
        prefix, suffix = rows.split([self.prefix, self.suffix])
        for run in (*prefix.split(tile), *suffix.split(tile)):
            run.fill_(bool(run.any()))
        grid = torch.ones(self.tokens - len(rows), dtype=torch.bool)
        return torch.cat([prefix, grid, suffix])

    def _empty(self, heads: int) -> tuple[Tensor, Tensor]:
        """NaN in this problem's layout, and in it the [B, H, N, D] that are to be used."""
        sizes = {"B": self.batch, "S": self.tokens + 2, "H": heads, "D": self.head_dim}
        whole = torch.full([sizes[d] for d in self.layout], torch.nan, dtype=self.dtype)
        return whole, whole.permute(*[self.layout.index(d) for d in "BHSD"])[:, :, 1:-1]

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """query, key, value and the mask of global keys; inputs lie between NaN."""
        generator = torch.Generator().manual_seed(self.seed)

        def tensor(name: str, heads: int) -> Tensor:
            _, inner = self._empty(heads)
            inner.copy_(torch.randn(inner.shape, generator=generator))
            for place, value in self.poison.get(name, []):
                inner[place] = value
            return inner

        query = tensor("query", self.heads)
        key, value = (tensor(name, self.kv_heads) for name in ("key", "value"))
        if not self.masks_keys:
            return query, key, value, None
        shown = torch.rand((self.batch, self.prefix + self.suffix), generator=generator) < 0.5
        return query, key, value, shown

    def run(
        self,
        name: str,
        *,
        schedule: int = 0,
        multiprocessors: int = 1,
        loaded: interpreter.Library | None = None,
    ) -> tuple[Tensor, Tensor, interpreter.Counts]:
        """Output and logsumexp of a launch of kernel `name`.

        Raises:
            interpreter.PtxError: the kernel breaks a rule under this schedule.
        """
        functions = (loaded or library(name)).functions
        query, key, value, key_mask = self.inputs()
        around, output = self._empty(self.heads)
        logsumexp = torch.full((self.batch, self.heads, self.tokens), torch.nan)
        major, minor = ARCHITECTURES[name][1]
        minor = minor if self.minor is None else self.minor
        interpreter.configure(schedule, multiprocessors, (major, minor))
        for tensor in (query, key, value):
            interpreter.register(tensor)
        interpreter.register(output, writable=True)
        interpreter.register(logsumexp, writable=True)
        native = NativeProblem(
            {torch.bfloat16: BF16, torch.float16: FP16}[self.dtype],
            self.batch,
            self.heads,
            self.kv_heads,
            self.head_dim,
            len(self.axes),
            (GridAxis * 3)(*[GridAxis(*map(int, axis)) for axis in self.axes]),
            self.prefix,
            self.suffix,
            self.asked.start,
            self.asked.stop,
        )
        native.scale = self.head_dim**-0.5 if self.scale is None else self.scale
        if key_mask is not None:
            interpreter.register(key_mask)
            native.key_mask = key_mask.data_ptr()
            native.key_mask_batch_stride, native.key_mask_token_stride = key_mask.stride()
        views = [TensorView(x.data_ptr(), *x.stride()[:3]) for x in (query, key, value, output)]
        if (
            functions.gna_forward(native, *map(ctypes.byref, views), logsumexp.data_ptr(), None)
            != 0
        ):
            raise interpreter.PtxError(functions.gna_message().decode())
        result = output.clone()
        output.fill_(torch.nan)
        assert around.isnan().all(), "something was stored outside the output"
        return result, logsumexp, interpreter.counts()

    def expected(self) -> tuple[Tensor, Tensor]:
        query, key, value, key_mask = self.inputs()
        visible = oracle.mask(**self.geometry, prefix=self.prefix, suffix=self.suffix)
        output, logsumexp = oracle.attention(
            query,
            key,
            value,
            visible=visible,
            key_mask=key_mask,
            scale=self.scale,
            prefix=self.prefix,
        )
        output[:, :, ~self.written] = torch.nan
        logsumexp[:, :, ~self.written] = torch.nan
        return output, logsumexp

    def check(self, name: str, **how: Any) -> interpreter.Counts:
        """Runs the kernel and compares; fails if it is not right to the tolerance of hardware."""
        output, logsumexp, counted = self.run(name, **how)
        of_output, of_logsumexp = self.expected()
        error = deviation(output, of_output)
        finite = of_logsumexp.isfinite()
        assert torch.equal(logsumexp.isfinite(), finite), "logsumexp"
        difference = (logsumexp.double() - of_logsumexp)[finite].abs()
        largest = float(difference.max()) if finite.any() else 0.0
        assert error < TOLERANCE[self.dtype][0], (error, self)
        assert largest < TOLERANCE[self.dtype][1], (largest, self)
        return counted


def deviation(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; inf where not the same elements are NaN, inf or -inf."""
    for is_special in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(is_special(actual), is_special(expected)):
            return math.inf
    actual, expected = (x.double().nan_to_num(0, 0, 0) for x in (actual, expected))
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def random_attention(seed: int, name: str) -> Attention:
    """A small problem of any kind: 1 to 12 key tiles for each query tile."""
    rng = random.Random(seed)
    rank = rng.choice([1, 2, 2, 3, 3])
    longest = {1: 500, 2: 20, 3: 8}[rank]

    def boxes(log2_tile: int) -> list[int]:
        extents = [0] * rank
        for _ in range(log2_tile):
            extents[rng.randrange(rank)] += 1
        return extents

    query_boxes, key_boxes = boxes(8 if name == "sm100" else 7), boxes(7)
    dilated = rng.random() < 0.3
    axes = []
    for query_box, key_box in zip(query_boxes, key_boxes, strict=True):
        length = rng.randint(1, longest)
        # What TMA's element strides and boxes allow.
        box = max(query_box, key_box)
        most = min(length, 8, 256 >> box) if dilated else 1
        dilation = rng.randint(1, most)
        window = rng.choice([rng.randint(1, length // dilation), length // dilation])
        stride = rng.choice([1, rng.randint(1, window), window])
        axes.append((length, window, stride, dilation, rng.random() < 0.2, query_box, key_box))
    kv_heads = rng.choice([1, 1, 2])
    prefix, suffix = (rng.choice([0, 0, rng.randint(1, 5), rng.randint(1, 150)]) for _ in range(2))
    attention = Attention(
        axes,
        batch=rng.choice([1, 1, 2]),
        heads=kv_heads * rng.choice([1, 1, 2]),
        kv_heads=kv_heads,
        head_dim=rng.choice([64, 64, 128, 128, 8 * rng.randint(1, 15)]),
        dtype=rng.choice(list(TOLERANCE)),
        prefix=prefix,
        suffix=suffix,
        masks_keys=rng.random() < 0.4,
        scale=rng.choice([None, None, 0.3, 1.0]),
        seed=seed,
        layout=rng.choice(["BSHD", "BHSD", "SBHD"]),
        minor=rng.choice([0, 3]) if name == "sm100" else None,
    )
    if rng.random() < 0.3:
        start, stop = sorted(rng.randint(0, prefix + suffix) for _ in range(2))
        attention.global_queries = range(start, stop)
    return attention
