"""The plots of result files; needs matplotlib, but neither a GPU nor PyTorch's compiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import record

_LABELS = {
    "ours": "gna-compile",
    "flex": "FlexAttention, tile order",
    "cudnn": "cuDNN, dense",
    "fa2": "FlashAttention-2, dense",
}
_COLORS = {"ours": "tab:blue", "flex": "tab:orange", "cudnn": "tab:green", "fa2": "tab:gray"}
_KINDS = {
    "attention": "tab:blue",
    "matmul": "tab:gray",
    "pointwise": "tab:olive",
    "copies": "tab:red",
    "other": "tab:brown",
}


def main(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Result files; all that have a plot if none.")
    ] = None,
) -> None:
    """Draws the plots of result files again."""
    for path in files or sorted(record.RESULTS.glob("*.json")):
        draw(path)


def draw(path: Path) -> None:
    """Writes the plots of one result file beside it; says so where there is no matplotlib."""
    plots = {"kernels": (rates, predictions), "models": (steps,)}.get(path.stem.split("-")[0])
    if plots is None:
        return
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'gna-compile[plot]')")
        return
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same file from the same results
    from matplotlib import pyplot

    data = json.loads(path.read_text())
    for plot in plots:
        figure = plot(pyplot, data["results"], _title(data["environment"]))
        if figure is None:
            continue
        name = path.with_suffix(".svg" if plot is plots[0] else f".{plot.__name__}.svg")
        figure.savefig(name, metadata={"Date": None})
        pyplot.close(figure)
        print(f"drawn: {name}")


def _title(environment: dict[str, Any]) -> str:
    versions = environment["versions"]
    cudnn = f", cuDNN {versions['cudnn']}" if "cudnn" in versions else ""
    return (
        f"{environment.get('gpu') or environment['cpu']}, torch {versions['torch']}{cudnn}, "
        f"commit {environment['commit'][:7]}"
    )


def rates(pyplot: Any, results: list[dict[str, Any]], title: str) -> Any:
    """Useful TFLOP/s of every candidate, case by case."""
    figure, axes = pyplot.subplots(figsize=(9, 0.52 * len(results) + 1.6))
    for index, (peer, label) in enumerate(_LABELS.items()):
        values = [result["tflops"].get(peer, 0) for result in results]
        places = [place + 0.2 * (index - 1.5) for place in range(len(results))]
        axes.barh(places, values, height=0.18, label=label, color=_COLORS[peer])
    # What dense attention reaches on all its FLOPs: a kernel at its rate would end there.
    ceiling = [result["tflops"].get("cudnn", float("nan")) * result["bound"] for result in results]
    axes.plot(ceiling, range(len(results)), "k|", markersize=16, label="cuDNN's rate, all FLOPs")
    axes.set_yticks(range(len(results)), [result["case"] for result in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("useful TFLOP/s: FLOPs of the visible pairs over time (higher is better)")
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    return figure


def predictions(pyplot: Any, results: list[dict[str, Any]], title: str) -> Any:
    """The planner's time against the measured one; None if there is nothing to compare."""
    points = [
        (result["ms"]["ours"], result["predicted_ms"], result["case"])
        for result in results
        if "ours" in result["ms"] and result["predicted_ms"] is not None
    ]
    if not points:
        return None
    figure, axes = pyplot.subplots(figsize=(6.5, 6))
    times = [time for *both, _ in points for time in both]
    ends = [0.7 * min(times), 1.4 * max(times)]
    axes.plot(ends, ends, "k-", linewidth=0.7)
    band = ([0.9 * end for end in ends], [1.1 * end for end in ends])
    axes.fill_between(ends, *band, color="tab:green", alpha=0.2, label="within 10 %")
    axes.scatter([point[0] for point in points], [point[1] for point in points], s=14)
    for measured, predicted, case in points:
        below = predicted < measured
        place: dict[str, Any] = {
            "xytext": (4, -6) if below else (-4, 5),
            "ha": "left" if below else "right",
        }
        place["textcoords"] = "offset points"
        axes.annotate(case, (measured, predicted), fontsize=6, **place)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.legend(fontsize=8, loc="upper left")
    axes.set_xlabel("measured, ms")
    axes.set_ylabel("predicted by the planner, ms")
    axes.set_title(title, fontsize=8)
    figure.tight_layout()
    return figure


def steps(pyplot: Any, results: list[dict[str, Any]], title: str) -> Any:
    """Device time of a step by kind of kernel, as a share of the dense step's."""
    figure, axes = pyplot.subplots(figsize=(9, 0.9 * len(results) + 1.4))
    labels: list[str] = []
    for index, result in enumerate(results):
        whole = sum(result["dense"]["profile_ms"].values())
        for place, side in ((2 * index, "dense"), (2 * index + 0.85, "gna")):
            left = 0.0
            for kind, color in _KINDS.items():
                width = 100 * result[side]["profile_ms"][kind] / whole
                label = kind if not labels and side == "dense" else None
                axes.barh(place, width, left=left, height=0.75, color=color, label=label)
                left += width
            text = f" {result[side]['ms']:.0f} ms"
            if side == "gna":
                text += f", {result['speedup']:.2f}× of at most {result['bound']:.2f}×"
            axes.text(left, place, text, va="center", fontsize=7)
        labels.append(result["model"])
    places = [at for index in range(len(results)) for at in (2 * index, 2 * index + 0.85)]
    names = [f"{label}, {side}" for label in labels for side in ("inductor", "gna")]
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 118)
    axes.set_xlabel("device time of a step, % of the dense step's")
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=7, ncol=len(_KINDS), loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.tight_layout()
    return figure
