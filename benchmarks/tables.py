"""Writes the tables of README.md and docs: models from tests/golden, speeds from benchmarks/results.

`make test` fails when a table is not current. After a change of decisions, and having looked at it:
`UPDATE_GOLDEN=1 make test`, then `python benchmarks/tables.py`; after a benchmark the latter alone.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def results() -> str:
    """Eight results in short: models, a loop, the kernels of a GPU and of a CPU."""
    rows = [["what", "on", "dense", "gna", "speedup", "bound"]]
    chosen = {
        "models": ("flux", "hunyuan-video", "wan", "cosmos"),
        "denoising": ("hunyuan-video",),
        "kernels": ("hunyuan-gna", "hunyuan-na"),
    }
    for benchmark, names in chosen.items():
        for _, data in _of_gpus(benchmark):
            gpu = data["environment"]["gpu"].removeprefix("NVIDIA ")
            by_name = {row.get("model") or row["case"]: row for row in data["results"]}
            rows += [_in_short(by_name[name], gpu) for name in names if name in by_name]
    cpu = _results("cpu.json")
    (best,) = (
        row
        for row in cpu["results"]["rows"]
        if (row["case"], row["head_dim"], row["dtype"]) == ("64x64, window 13", 128, "fp32")
    )
    times = [f"{best[name]:.1f} ms" for name in ("dense", "ours")]
    gain = f"**{best['dense'] / best['ours']:.1f}×**"
    name = f"attention, {best['case']}, {best['dtype']}"
    on = f"CPU, {cpu['environment']['threads']} threads"
    return _table([*rows, [name, on, *times, gain, f"{best['tile_bound']:.1f}×"]])


def _in_short(row: dict[str, Any], gpu: str) -> list[str]:
    gain = row["speedups"]["ours"] if "case" in row else row["speedup"]
    if "case" in row:
        name = f"attention, case `{row['case']}`"
        times = [f"{row['ms'][side]:.1f} ms" for side in ("cudnn", "ours")]
    elif "steps" in row:
        name = f"{row['model']}, a loop of {row['steps']} steps"
        times = [f"{row[side]['seconds']:.1f} s" for side in ("dense", "gna")]
    else:
        name = f"{row['model']}, a step of {row['layers']} layers"
        times = [f"{row[side]['ms']:.0f} ms" for side in ("dense", "gna")]
    bound = f"{row['bound']:.2f}×" if "bound" in row else "–"
    return [name, gpu, *times, f"**{gain:.2f}×**", bound]


def models() -> str:
    """One row for each `*.decisions.txt`: model, sites found, rewritten, dense by reason."""
    rows = [["model", "sites", "rewritten", "layout from", "dense"]]
    for path in sorted((ROOT / "tests" / "golden").glob("*.decisions.txt")):
        title, *lines = path.read_text().splitlines()
        sites = [[cell.strip() for cell in line.split("|")] for line in lines]
        reasons = Counter(became for *_, became in sites if not became.startswith("gna "))
        sources = dict.fromkeys(
            layout.partition("(")[2].rstrip(")")
            for *_, layout, became in sites
            if became.startswith("gna ")
        )
        rewritten = len(sites) - reasons.total()
        dense = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        cells = [title, str(len(sites)), str(rewritten), ", ".join(sources) or "–", dense or "–"]
        rows.append(cells)
    return _table(rows)


def patterns() -> str:
    """Several grids, and heads that differ, per GPU."""
    parts = []
    for _, data in _of_gpus("patterns"):
        heads = (
            "case, sequence, ran on, FLOP bound, cuDNN dense ms, ours ms, speedup, of the bound, "
            "groups alone over together"
        )
        rows = [heads.split(", ")]
        for row in data["results"]:
            providers = ", ".join(dict.fromkeys(row["provider"].split(", ")))
            alone = row["of_groups"]
            rows.append(
                [row["case"], row["pattern"], providers, f"{row['bound']:.2f}×"]
                + [f"{row['ms'][name]:.1f}" for name in ("cudnn", "ours")]
                + [f"**{row['speedup']:.2f}×**", f"{row['of_bound']:.0%}"]
                + ["–" if alone is None else f"{alone:.3f}"]
            )
        parts.append(f"{_about(data)}\n\n{_table(rows)}")
    return "\n\n".join(parts)


def kernels() -> str:
    """For each GPU the Hopper kernel beside its baselines, then the plots."""
    head = ["case", "FLOP bound", "cuDNN dense, ms", "ours, ms", "FlashAttention-2, dense"]
    head += ["FlexAttention", "ours", "of the bound", "useful TFLOP/s", "planner's error"]
    parts = []
    for path, data in _of_gpus("kernels"):
        rows, notes = [head], []
        for result in data["results"]:
            ms, gains = result["ms"], result["speedups"]
            error, gain = result["prediction_error"], gains.get("ours")
            cells = [result["case"], f"{result['bound']:.2f}×"]
            cells += [f"{ms['cudnn']:.1f}" if "cudnn" in ms else "–"]
            cells += [f"{ms['ours']:.2f}" if "ours" in ms else "–"]
            cells += [f"{gains[peer]:.2f}×" if peer in gains else "–" for peer in ("fa2", "flex")]
            cells += [f"**{gain:.2f}×**", f"{gain / result['bound']:.0%}"] if gain else ["–", "–"]
            cells += [f"{result['tflops']['ours']:.0f}" if "ours" in ms else "–"]
            rows.append([*cells, "–" if error is None else f"{error:+.1%}"])
            if "cudnn-masked" in ms:
                notes.append(
                    f"With the mask of padded text, as Inductor runs it, cuDNN takes "
                    f"{ms['cudnn-masked']:.0f} ms on `{result['case']}`."
                )
            notes += [
                f"`{peer}` did not run on `{result['case']}`: {reason}"
                for peer, reason in result["failed"].items()
            ]
        plots = _images(path, ("", "Useful TFLOP/s"), (".predictions", "Predicted and measured"))
        notes += _kept(data["results"], "case")
        parts += [f"{_about(data)}:", _table(_told(rows)), *notes, *plots]
    return "\n\n".join(parts)


def transformers() -> str:
    """For each GPU whole transformers, dense and gna, then the plot."""
    head = ["model", "tokens", "layers", "policy", "Inductor, ms", "gna, ms", "speedup", "bound"]
    head += ["of the bound", "attention's share", "cold compile, s", "peak, GiB"]
    parts = []
    for path, data in _of_gpus("models"):
        rows, notes = [head], []
        for _, variant in ((path, data), *_files(f"{path.stem}-*.json")):
            if _about(variant) != _about(data):
                names = ", ".join(_variant(variant["results"][0]))
                notes.append(f"The rows with {names} are from {_about(variant)}.")
            for result in variant["results"]:
                dense, gna = result["dense"], result["gna"]
                grid = "×".join(map(str, result["grid"]))
                cells = [", ".join([result["model"], *_variant(result)])]
                cells += [f"{grid} + {result['text']}", str(result["layers"]), result["policy"]]
                cells += [f"{dense['ms']:.0f}", f"{gna['ms']:.0f}", f"**{result['speedup']:.2f}×**"]
                cells += [f"{result['bound']:.2f}×", f"{result['speedup'] / result['bound']:.0%}"]
                cells += [f"{dense['attention_share']:.0%} → {gna['attention_share']:.0%}"]
                cells += [f"{dense['cold_s']:.0f} → {gna['cold_s']:.0f}"]
                # What CUDA graphs hold is not counted.
                peak = f"{dense['peak_gib']:.1f} → {gna['peak_gib']:.1f}"
                rows.append([*cells, "–" if result["mode"] else peak])
        plots = _images(path, ("", "Device time of a step"))
        notes += _kept(data["results"], "model")
        parts += [f"{_about(data)}:", _table(rows), *notes, *plots]
    return "\n\n".join(parts)


def _variant(result: dict[str, Any]) -> list[str]:
    """In what a run differs from whole-model compilation of batch 1 in bf16."""
    parts = ["block by block"] if result["regional"] else []
    parts += [f"mode {result['mode']}"] if result["mode"] else []
    parts += [f"batch {result['batch']}"] if result["batch"] != 1 else []
    return parts + ([result["dtype"]] if result["dtype"] != "bf16" else [])


def loops() -> str:
    """For each GPU whole denoising loops."""
    head = ["model", "policy", "steps", "of them dense", "Inductor, s", "gna, s", "speedup"]
    head += ["the paper's whole runs, B200", "graphs compiled in the loop"]
    parts = []
    for _, data in _of_gpus("denoising"):
        rows = [head]
        for result in data["results"]:
            dense, gna = result["dense"], result["gna"]
            cells = [f"{result['model']}, {result['layers']} layers", result["policy"]]
            cells += [str(result["steps"]), str(gna["steps"].get("warmup", 0))]
            cells += [f"{dense['seconds']:.1f}", f"{gna['seconds']:.1f}"]
            cells += [f"**{result['speedup']:.2f}×**", f"{result['paper']:.2f}×"]
            rows.append([*cells, str(sum(gna["compiled again"].values()))])
        parts += [f"{_about(data)}:", _table(rows), *_kept(data["results"], "model")]
    return "\n\n".join(parts)


def resolutions() -> str:
    """For each GPU several sizes in one process, each first call and a later one."""
    head = ["model", "tokens", "graphs compiled", "first call, s", "a later call, ms", "speedup"]
    parts = []
    for _, data in _of_gpus("resolutions"):
        rows = [head]
        calls = {(c["model"], *c["grid"], c["backend"]): c for c in data["results"]}
        for dense in data["results"]:
            if dense["backend"] != "inductor":
                continue
            gna = calls[(dense["model"], *dense["grid"], "gna")]
            cells = [dense["model"], "×".join(map(str, dense["grid"]))]
            for key, digits in (("graphs", 0), ("first_s", 1), ("ms", 0)):
                cells += [f"{dense[key]:.{digits}f} → {gna[key]:.{digits}f}"]
            rows.append([*cells, f"**{dense['ms'] / gna['ms']:.2f}×**"])
        parts += [f"{_about(data)}:", _table(rows), *_kept(data["results"], "model")]
    return "\n\n".join(parts)


def training() -> str:
    """For each GPU forward and backward of the op beside dense attention's."""
    columns = {"cudnn": "cuDNN dense, ms", "fa2": "FlashAttention-2 dense, ms"}
    columns |= {"flex": "FlexAttention, ms", "sm90": "ours, ms"}
    parts = []
    for _, data in _of_gpus("backward"):
        rows = [["case", "FLOP bound", *columns.values(), "speedup"]]
        for result in data["results"]:
            ms, gain = result["ms"], result["speedups"].get("sm90")
            times = [f"{ms[name]:.1f}" if name in ms else "–" for name in columns]
            cells = [result["case"], f"{result['bound']:.2f}×", *times]
            rows.append([*cells, f"**{gain:.2f}×**" if gain else "–"])
        parts += [f"{_about(data)}:", _table(_told(rows)), *_kept(data["results"], "case")]
    return "\n\n".join(parts)


def cpu() -> str:
    """Speedups of the CPU kernel over PyTorch's dense attention."""
    data = _results("cpu.json")
    about, results = data["environment"], data["results"]
    head = ["case", "head_dim", "dtype", "tile bound", "forward", "with backward"]
    rows = [[*head, "FlexAttention", "portable"]]
    for row in results["rows"]:
        cells = [row["case"], str(row["head_dim"]), row["dtype"], f"{row['tile_bound']:.1f}×"]
        for name in ("ours", "ours_training", "flex", "portable"):
            dense = row["dense_training" if "training" in name else "dense"]
            cells.append(f"{dense / row[name]:.1f}×" if row[name] else "–")
        rows.append(cells)
    return (
        f"{about['cpu']}, {about['threads']} threads, batch 1, {results['heads']} heads, torch "
        f"{about['versions']['torch']}, commit {about['commit'][:7]}:\n\n{_table(rows)}"
    )


def overhead() -> str:
    """The backend's own time beside Inductor's."""
    data = _results("overhead.json")
    rows = [["shapes", "sites", "ours", "Inductor", "share"]]
    for name, runs in data["results"].items():
        ours, inductor = (statistics.median(r[key] for r in runs) for key in ("ours", "inductor"))
        times = [f"{ours * 1e3:.0f} ms", f"{inductor:.1f} s", f"{ours / inductor:.2%}"]
        rows.append([name, f"{runs[0]['sites']:.0f}", *times])
    return _table(rows)


PAGES = {
    "README.md": (results,),
    "docs/decisions.md": (models,),
    "docs/benchmarks.md": (
        transformers,
        loops,
        resolutions,
        kernels,
        patterns,
        training,
        cpu,
        overhead,
    ),
}
"""The pages with tables, and their tables in order."""


def with_tables(page: str) -> str:
    """The text of a page with current tables between their marks."""
    text = (ROOT / page).read_text()
    for table in PAGES[page]:
        begin, end = f"<!-- table: {table.__name__} -->", f"<!-- end of {table.__name__} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{page} has no {begin} ... {end}")
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


def _results(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def _files(pattern: str) -> list[tuple[Path, Any]]:
    return [(path, _results(path.name)) for path in sorted(RESULTS.glob(pattern))]


def _of_gpus(benchmark: str) -> list[tuple[Path, Any]]:
    """The files NAME-GPU.json, without the variants NAME-GPU-*.json."""
    return [
        (path, data)
        for path, data in _files(f"{benchmark}-*.json")
        if "-" not in path.stem.removeprefix(f"{benchmark}-")
    ]


def _about(data: Any) -> str:
    environment = data["environment"]
    versions = environment["versions"]
    names = {"torch": "torch", "diffusers": "diffusers", "triton": "Triton", "cudnn": "cuDNN"}
    told = {**versions}
    if versions.get("cudnn"):  # a number such as 91900
        told["cudnn"] = f"{versions['cudnn'] // 10000}.{versions['cudnn'] // 100 % 100}"
    parts = [f"{label} {told[name]}" for name, label in names.items() if told.get(name)]
    if commit := environment["commit"][:7]:
        changed = " with changes" if environment.get("uncommitted changes") else ""
        parts.append(f"commit {commit}{changed}")
    return ", ".join([environment["gpu"], *parts])


def _kept(results: list[Any], key: str) -> list[str]:
    """Names the rows that are of an earlier commit than their file."""
    commits: dict[str, dict[str, None]] = {}
    for row in results:
        if "commit" in row:
            commits.setdefault(row["commit"][:7], {})[f"`{row[key]}`"] = None
    return [f"Of commit {commit}: {', '.join(names)}." for commit, names in commits.items()]


def _images(path: Path, *plots: tuple[str, str]) -> list[str]:
    """The plots that were drawn of a result file: (what follows its name, title)."""
    return [
        f"![{title}]({os.path.relpath(image, ROOT / 'docs')})"
        for suffix, title in plots
        if (image := path.with_suffix(f"{suffix}.svg")).is_file()
    ]


def _told(rows: list[list[str]]) -> list[list[str]]:
    """Without empty columns."""
    told = [i for i in range(len(rows[0])) if any(row[i] != "–" for row in rows[1:])]
    return [[row[i] for i in told] for row in rows]


def _table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(with_tables(page))
