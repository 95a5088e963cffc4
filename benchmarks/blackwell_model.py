"""What the Blackwell kernel should reach, from its machine code and its plans: a model, no measurement.

`python benchmarks/blackwell_model.py` compiles the kernel (with nvcc and nvdisasm), counts
what a key tile costs and prints the tables of docs/blackwell.md.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gna_compile.planner import ARCHITECTURES, Plan, dense_plan, end_to_end, plan
from gna_compile.simulate.cases import CASES

ROOT = Path(__file__).resolve().parent.parent

ROWS, KEYS = 128, 128  # of a half, of a key tile
UNITS, CLOCK = ARCHITECTURES["sm100"].units, 1.85  # GHz: a B200's boost clock is 1.85 to 1.97
FLOPS = ARCHITECTURES["sm100"].flops  # per clock and SM
SHARED_BYTES = 128  # per clock and SM
QUARTERS = 4  # of an SM, each with a warp of either half

# Cycles of a quarter for an instruction of a warp, by its pipe: throughputs of CUDA's programming guide.
EXPONENTIAL, FMA, FMA_PAIR, ALU = 8, 1, 2, 2
PIPES = {"MUFU": EXPONENTIAL, "FFMA2": FMA_PAIR, "FADD2": FMA_PAIR, "FMUL2": FMA_PAIR}
PIPES |= dict.fromkeys(("FFMA", "FADD", "FMUL", "IMAD"), FMA)
PIPE_NAMES = {"MUFU": "exponentials", **dict.fromkeys(list(PIPES)[1:], "FMA")}

# Assumed, in cycles: a step's hops between warps and through tensor memory; starting a query tile.
HOPS, START = 400, 1000

# Dense attention of the best public kernel, FlashAttention-4, TFLOP/s on a B200.
BEST_DENSE = 1613

# NATTEN's documentation, B200: milliseconds of its kernel, and with its token permutation.
PUBLISHED = {
    "hunyuan-na": "42.2 / 47.4",
    "hunyuan-gna": "13.0 / 18.5",
    "flux4k-na": "8.7 / 10.9",
    "flux4k-gna": "4.1 / 6.4",
}

# Attention's share of a dense run, and how much faster the run got on a B200 without dense steps, as
# measured by the paper (arXiv 2504.16922).
_HUNYUAN, _FLUX, _COSMOS = 0.654 * 0.928, 0.568 * 0.912, 0.587
RUNS = {
    "hunyuan-gna": (_HUNYUAN, 2.23),
    "hunyuan-na": (_HUNYUAN, 1.73),
    "hunyuan-58": (_HUNYUAN, 1.53),
    "flux4k-gna": (_FLUX, 1.82),
    "flux4k-na": (_FLUX, 1.65),
    "cosmos-56-gna": (_COSMOS, 1.46),
    "cosmos-89-gna": (_COSMOS, 2.05),
    "cosmos-89-na": (_COSMOS, 1.76),
}


class Step(NamedTuple):
    """What one warp of the softmax does for a key tile: instructions by name."""

    full: Counter[str]
    partial: Counter[str]

    def cycles(self, pipe: str) -> int:
        """Of a quarter, for both halves' warps, on a full block."""
        return 2 * sum(
            count * PIPES.get(name, ALU)
            for name, count in self.full.items()
            if PIPE_NAMES.get(name, "other") == pipe
        )


def step_of(head_dim: int) -> Step:
    """Counted in the compiled kernel for bf16.

    Raises:
        RuntimeError: without nvcc or nvdisasm.
    """
    code, labels = _machine_code(head_dim)
    start = next(i for i, line in enumerate(code) if line.startswith("LDTM.x32"))
    paths = [Counter(_name(line) for line in path) for path in _paths(code, labels, start)]
    # The weights of a tile, some exponentials by polynomial; no new offset.
    steps = [p for p in paths if p["STTM"] == 4 and p["LDTM"] == 4 and p["MUFU"] < KEYS]
    full = min((p for p in steps if p["FSEL"] < KEYS), key=Counter.total)
    partial = min((p for p in steps if p["FSEL"] >= KEYS), key=Counter.total)
    return Step(full, partial)


def _machine_code(head_dim: int) -> tuple[list[str], dict[str, int]]:
    """The instructions of the kernel that is not the fallback, without predicates, and its labels."""
    packaged = sorted(Path(sysconfig.get_path("platlib")).glob("nvidia/cu*/bin/nvdisasm"))
    disassembler = shutil.which("nvdisasm") or (str(packaged[-1]) if packaged else None)
    if disassembler is None or shutil.which("nvcc") is None:
        raise RuntimeError("needs nvcc and nvdisasm (pip install nvidia-cuda-nvdisasm)")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "-cubin", f"-I{ROOT / 'csrc/include'}"]
        target = ["-gencode", "arch=compute_100f,code=sm_100f"]
        source = ROOT / f"csrc/sm100/kernels/bf16_{head_dim}.cu"
        subprocess.run(["nvcc", *flags, *target, str(source), "-o", str(cubin)], check=True)
        text = subprocess.run(
            [disassembler, "-c", str(cubin)], check=True, capture_output=True, text=True
        ).stdout
    section = next(s for s in text.split(".section\t.text.")[1:] if "7forwardI" in s[:80])
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in section.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(found[1])
    return code, labels


def _paths(code: list[str], labels: dict[str, int], start: int) -> list[list[str]]:
    """All ways from `start` to the arrival after the last weights, none through a place twice."""
    ends: list[list[str]] = []
    stack: list[tuple[int, list[int]]] = [(start, [])]
    while stack:
        at, path = stack.pop()
        while at not in path:
            path = [*path, at]
            line = code[at]
            stored = sum("STTM.x16" in code[i] for i in path)
            if "SYNCS.ARRIVE" in line and stored == 4:
                ends.append([code[i] for i in path])
                break
            found = re.search(r"BRA\S*\s.*\((\.L_x_\d+)\)", line)
            if found is None:
                if re.search(r"\b(EXIT|RET)\b", line):
                    break
                at += 1
                continue
            if line.startswith("@") or ".U " in line:
                stack.append((at + 1, path))
            at = labels[found[1]]
    return ends


def _name(line: str) -> str:
    words = line.split()
    return (words[1] if words[0].startswith("@") else words[0]).split(".")[0]


class Costs(NamedTuple):
    """Cycles of an SM for a key tile, both halves using it."""

    matrix: float
    exponentials: float
    fma: float
    issue: float
    shared: float
    chain: float  # a half's MMAs and its softmax, one after the other
    mask: float  # on top, on a partial block

    @property
    def period(self) -> float:
        return max(self.matrix, self.exponentials, self.fma, self.issue, self.shared, self.chain)


def costs_of(head_dim: int, step: Step) -> Costs:
    product = 2 * ROWS * KEYS * head_dim / FLOPS
    tile_bytes = KEYS * head_dim * 2
    # Either half reads both factors of S, and V; keys and values are written.
    shared = (2 * 3 * tile_bytes + 2 * tile_bytes) / SHARED_BYTES
    alone = max(step.cycles("exponentials"), step.cycles("FMA"), 2 * step.full.total()) / 2
    largest = step.full["FMNMX3"] * ALU
    # P·V starts after three quarters of P.
    chain = 2 * product + largest + alone * 3 / 4 + HOPS
    masked = step.partial - step.full
    return Costs(
        4 * product,
        step.cycles("exponentials"),
        step.cycles("FMA"),
        2 * step.full.total(),
        shared,
        chain,
        masked.total() * ALU,
    )


def milliseconds(cut: Plan, costs: Costs) -> float:
    tiles = cut.grid.query_tiles + cut.globals.query_tiles
    cycles = tiles * START + cut.visited * costs.period + cut.partial * costs.mask
    waves = -(-tiles * cut.workload.heads // UNITS)
    longest = max(cut.grid.visited.max, cut.globals.visited.max) * costs.period
    return max(waves * cycles / tiles, longest) / CLOCK * 1e-6


def main() -> None:
    costs = {}
    print("| per key tile, both halves, cycles | head_dim 64 | head_dim 128 |\n|---|---|---|")
    steps = {head_dim: step_of(head_dim) for head_dim in (64, 128)}
    for head_dim, step in steps.items():
        costs[head_dim] = costs_of(head_dim, step)
    for field in (*Costs._fields, "period"):
        print(_row((field, *(f"{getattr(costs[d], field):.0f}" for d in (64, 128)))))
    for kind in ("full", "partial"):
        for head_dim, step in steps.items():
            counted = getattr(step, kind)
            most = ", ".join(f"{count} {name}" for name, count in counted.most_common(9))
            print(f"{kind} {head_dim}: {counted.total()} instructions of a warp: {most}")

    peak = FLOPS * UNITS * CLOCK * 1e-3
    dense = costs[128].matrix / costs[128].period * peak
    share = BEST_DENSE / dense
    print(f"\ndense, head_dim 128: {dense:.0f} TFLOP/s; FlashAttention-4 has {share:.2f} of that\n")
    speedups: dict[str, float] = {}
    heads = (
        "case",
        "FLOP bound",
        "speedup",
        "ms",
        "of the peak",
        f"ms x {1 / share:.2f}",
        "NATTEN",
    )
    print(_row(heads), _row(["---"] * len(heads)), sep="\n")
    for name, case in CASES.items():
        workload, cost = case.workload, costs[case.head_dim]
        pairs = workload.neighborhood.pairs
        time = milliseconds(plan(workload, "sm100"), cost)
        dense_time = milliseconds(dense_plan(workload, "sm100"), cost)
        speedups[name] = dense_time / time
        useful = 4 * pairs * case.head_dim * case.heads / time * 1e-9
        cells = (
            *(name, f"{workload.neighborhood.tokens**2 / pairs:.2f}"),
            *(f"{speedups[name]:.2f}", f"{time:.2f}", f"{useful / peak:.0%}"),
            *(f"{time / share:.2f}", PUBLISHED.get(name, "")),
        )
        print(_row(cells))

    print(
        "\n" + _row(("whole run", "predicted", "the paper measured")), _row(["---"] * 3), sep="\n"
    )
    for name, (of_run, measured) in RUNS.items():
        predicted = end_to_end(speedups[name], of_run)
        print(_row((name, f"{predicted:.2f}", f"{measured:.2f}")))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
