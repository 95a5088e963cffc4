"""Backward times of providers on this machine's GPU, side by side in one run.

    python -m benchmarks.backward                             # all cases, flex and portable
    python -m benchmarks.backward flux4k-na --providers flex  # some of them

The peers take turns, as in `benchmarks.kernels`, whose cases these are.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels import CASES, Case, _time
from gna_compile.ops import neighborhood_attention


def backward(case: Case, inputs: list[Tensor], provider: str) -> Callable[[], object]:
    """One backward by a provider, after its forward."""
    output = neighborhood_attention(
        *inputs,
        grid=case.grid,
        window=case.window,
        stride=case.stride,
        dilation=case.dilation,
        prefix=case.prefix,
        suffix=case.suffix,
        provider=provider,
    )
    assert isinstance(output, Tensor)
    return partial(torch.autograd.grad, output, inputs, torch.randn_like(output), retain_graph=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], metavar="case")
    parser.add_argument("--providers", nargs="+", default=["flex", "portable"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{'case':14}" + "".join(f"{name + ' ms':>14}" for name in arguments.providers))
    for name in arguments.cases or CASES:
        case = CASES[name]
        shape = (1, case.heads, case.neighborhood.tokens, case.head_dim)
        inputs = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        ]
        peers = [backward(case, inputs, provider) for provider in arguments.providers]
        for peer in peers:
            peer()
        turns = [[_time(peer, 1) for peer in peers] for _ in range(arguments.repeats)]
        medians = [statistics.median(column) for column in zip(*turns, strict=True)]
        print(f"{name:14}" + "".join(f"{median:14.2f}" for median in medians), flush=True)


if __name__ == "__main__":
    main()
