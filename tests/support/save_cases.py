"""Writes tests/data/sm90_cases.pt: results of the Hopper kernel for small problems, on such a GPU.

    python tests/support/save_cases.py

tests/providers/test_saved_cases.py compares it with other implementations where there is no such GPU.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "tests" / "data" / "sm90_cases.pt"
BYTES_OF_A_CASE = 24 << 10


@dataclass(frozen=True)
class SavedCase:
    """A small problem; its inputs follow from its place in `CASES`.

    Attributes:
        geometry: grid, window, stride, dilation, causal, prefix and suffix as the op takes them.
        shown: of the global tokens of the first sample, how many are not hidden; of each further
            sample one less. None for no key mask.
    """

    geometry: dict[str, Any]
    dtype: torch.dtype
    head_dim: int
    heads: int = 1
    kv_heads: int = 1
    batch: int = 1
    shown: int | None = None

    @property
    def tokens(self) -> int:
        grid = int(np.prod(self.geometry["grid"]))
        return grid + self.geometry.get("prefix", 0) + self.geometry.get("suffix", 0)

    @property
    def key_mask(self) -> Tensor | None:
        """[batch, global tokens]."""
        if self.shown is None:
            return None
        places = torch.arange(self.geometry.get("prefix", 0) + self.geometry.get("suffix", 0))
        return places[None] < self.shown - torch.arange(self.batch)[:, None]

    @property
    def step(self) -> int:
        """Of all rows, every so many-th is saved; odd, so that all places in a tile occur."""
        rows = self.batch * self.heads * self.tokens
        return -(-rows * (2 * self.head_dim + 4) // BYTES_OF_A_CASE) | 1

    def rows(self, tensor: Tensor) -> Tensor:
        """The saved rows of an output or a logsumexp."""
        return tensor.flatten(0, 2)[:: self.step].clone()

    def inputs(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, the same on every machine and under every version.

        Each byte b of PCG64's raw output becomes (2 b - 255) / 128, which bf16 and fp16 hold exactly.
        """
        source = np.random.PCG64(seed)

        def values(heads: int) -> Tensor:
            shape = (self.batch, heads, self.tokens, self.head_dim)
            words = source.random_raw(-(-int(np.prod(shape)) // 8)).astype("<u8")
            octets = words.view(np.uint8)[: np.prod(shape)].astype(np.float32)
            return torch.from_numpy((2 * octets - 255) / 128).view(shape).to(self.dtype)

        return values(self.heads), values(self.kv_heads), values(self.kv_heads)


_BF16, _FP16 = torch.bfloat16, torch.float16


def _grid(grid: tuple[int, ...], window: tuple[int, ...], **rest: Any) -> dict[str, Any]:
    return {"grid": grid, "window": window, **rest}


# fmt: off
CASES = {
    "1d": SavedCase(_grid((500,), (100,)), _BF16, 64),
    "1d blocked": SavedCase(_grid((512,), (128,), stride=(128,)), _FP16, 128),
    "1d causal": SavedCase(_grid((700,), (300,), stride=(4,), causal=(True,)), _FP16, 64),
    "1d dense": SavedCase(_grid((1450,), (1450,)), _BF16, 64),
    "2d": SavedCase(_grid((20, 24), (9, 7)), _BF16, 128),
    "2d blocked": SavedCase(_grid((32, 32), (16, 16), stride=(16, 16)), _BF16, 64),
    "2d dilated": SavedCase(
        _grid((24, 30), (5, 4), stride=(2, 1), dilation=(3, 5)), _FP16, 64
    ),
    "2d dilated, an axis causal": SavedCase(
        _grid((19, 23), (6, 9), dilation=(1, 2), causal=(False, True)), _FP16, 128
    ),
    "2d, head size 80": SavedCase(_grid((17, 40), (8, 12), stride=(2, 3)), _BF16, 80, 2),
    "3d grouped heads": SavedCase(_grid((6, 10, 12), (3, 5, 5)), _BF16, 128, 4, 2),
    "3d strided": SavedCase(_grid((8, 12, 20), (6, 8, 12), stride=(4, 4, 4)), _FP16, 128),
    "3d with global tokens": SavedCase(
        _grid((5, 9, 11), (3, 4, 6), stride=(1, 2, 3), prefix=37, suffix=20), _BF16, 64, 2
    ),
    "3d with a key mask": SavedCase(
        _grid((4, 9, 14), (2, 5, 7), suffix=150), _BF16, 128, 2, 1, batch=2, shown=70
    ),
    "3d dilated, global tokens, a key mask": SavedCase(
        _grid((4, 11, 15), (2, 3, 4), dilation=(2, 3, 1), causal=(True, False, False),
              prefix=5, suffix=9),
        _FP16, 64, 6, 3, shown=11,
    ),
    "itself and global tokens": SavedCase(_grid((13, 31), (1, 1), prefix=3), _BF16, 64),
}
# fmt: on


def main() -> None:
    """Runs all cases by the provider sm90 and writes the file."""
    # Run as a script, this finds the packages beside it.
    sys.path.insert(0, str(ROOT))
    from benchmarks import record
    from gna_compile.ops import neighborhood_attention

    about = {key: str(value) for key, value in record.environment().items()}
    results: dict[str, dict[str, Any]] = {}
    for seed, (name, case) in enumerate(CASES.items()):
        inputs = [tensor.cuda() for tensor in case.inputs(seed)]
        key_mask = case.key_mask
        output, logsumexp = neighborhood_attention(
            *inputs,
            **case.geometry,
            key_mask=None if key_mask is None else key_mask.cuda(),
            return_logsumexp=True,
            provider="sm90",
        )
        output, logsumexp = output.cpu().contiguous(), logsumexp.cpu().contiguous()
        results[name] = {
            "output": case.rows(output),
            "logsumexp": case.rows(logsumexp),
            # Of all rows, to tell whether a later kernel on such a GPU gives the same bits.
            "sha256": checksum(output, logsumexp),
            "inputs": checksum(*inputs),
        }
    torch.save({"environment": about, "results": results}, PATH)
    print(f"{PATH}: {len(results)} cases, {PATH.stat().st_size / 1024:.0f} KiB")


def checksum(*tensors: Tensor) -> str:
    """SHA-256 over the bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
