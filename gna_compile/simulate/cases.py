"""Problems with a name: the kernel cases that are measured, and the models of the shipped policies."""

from __future__ import annotations

from dataclasses import dataclass

from gna_compile.geometry import Neighborhood
from gna_compile.planner import Workload


@dataclass(frozen=True)
class Case:
    """One attention problem, batch 1, 16-bit elements."""

    grid: tuple[int, ...]
    heads: int
    head_dim: int
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...] | None = None
    prefix: int = 0
    suffix: int = 0
    key_mask: bool = False

    @property
    def workload(self) -> Workload:
        neighborhood = Neighborhood.of(
            self.grid, self.window, self.stride, self.dilation, None, self.prefix, self.suffix
        )
        return Workload(neighborhood, self.heads, self.head_dim, key_mask=self.key_mask)


@dataclass(frozen=True)
class Model:
    """What a shipped policy does not say of its model.

    Attributes:
        grid: tokens of the run that the policy is named after.
        prefix, suffix: global tokens in the attention of its blocks.
        key_mask: whether a mask hides some of them.
        heads, head_dim: of that attention.
        attention_share: share of the whole run's time that it takes when dense, on a B200 (arXiv
            2504.16922); None where nobody has published one.
    """

    grid: tuple[int, ...]
    heads: int = 24
    head_dim: int = 128
    prefix: int = 0
    suffix: int = 0
    key_mask: bool = False
    attention_share: float | None = None


_HUNYUAN, _FLUX, _COSMOS, _WAN = (30, 48, 80), (256, 256), (16, 44, 80), (21, 45, 80)
_LTX, _LINE = (32, 64, 96), (32768,)

CASES = {
    "hunyuan-gna": Case(_HUNYUAN, 24, 128, (18, 24, 24), (16, 8, 8)),
    "hunyuan-na": Case(_HUNYUAN, 24, 128, (18, 24, 24), (1, 1, 1)),
    "hunyuan-58": Case(_HUNYUAN, 24, 128, (30, 40, 40), (1, 32, 8)),
    "flux4k-gna": Case(_FLUX, 24, 128, (80, 80), (16, 16)),
    "flux4k-na": Case(_FLUX, 24, 128, (80, 80), (1, 1)),
    "cosmos-56-gna": Case(_COSMOS, 32, 128, (16, 32, 48), (1, 8, 16)),
    "cosmos-89-gna": Case(_COSMOS, 32, 128, (16, 24, 16), (1, 8, 16)),
    "cosmos-89-na": Case(_COSMOS, 32, 128, (16, 24, 16), (1, 1, 1)),
    "wan720p-gna": Case(_WAN, 40, 128, (12, 24, 24), (4, 8, 8)),
    "wan720p-na": Case(_WAN, 40, 128, (11, 23, 27), (1, 1, 1)),
    "1d-32k": Case(_LINE, 24, 128, (2048,), (256,)),
    "1d-32k-na": Case(_LINE, 24, 128, (2048,), (1,)),
    "ltx-11": Case(_LTX, 8, 64, (11, 11, 11), (1, 1, 1)),
    "ltx-355": Case(_LTX, 8, 64, (3, 5, 5), (1, 1, 1)),
    "dense": Case(_LINE, 24, 128, _LINE, (1,)),
    "dense-64": Case((196608,), 8, 64, (196608,), (1,)),
    "flux4k-text": Case(_FLUX, 24, 128, (80, 80), (16, 16), prefix=512),
    "hunyuan-text": Case(_HUNYUAN, 24, 128, (18, 24, 24), (16, 8, 8), suffix=256, key_mask=True),
    "dilated": Case(_COSMOS, 16, 128, (16, 4, 16), (1, 1, 1), (1, 11, 5)),
}
"""By name."""

_HUNYUAN_MODEL = Model(_HUNYUAN, 24, suffix=256, key_mask=True, attention_share=0.654 * 0.928)
_COSMOS_MODEL = Model(_COSMOS, 32, attention_share=0.587)

MODELS = {
    "flux-4k": Model(_FLUX, 24, prefix=512, attention_share=0.568 * 0.912),
    "hunyuan-video-720p": _HUNYUAN_MODEL,
    "hunyuan-video-720p-58": _HUNYUAN_MODEL,
    "cosmos-7b-720p": _COSMOS_MODEL,
    "cosmos-7b-720p-89": _COSMOS_MODEL,
    "cosmos-predict2-2b": Model((24, 44, 80), 16),
    "wan2.1-720p": Model(_WAN, 40),
    "wan2.2-a14b-720p": Model(_WAN, 40),
    "flux2-4k": Model(_FLUX, 48, prefix=512),
    "flux3-4k": Model(_FLUX, 24, prefix=512),
}
"""By the name of the shipped policy."""
