"""Result files: the numbers, and the machine, versions and commit that they belong to."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def save(name: str, results: Any) -> Path:
    """Writes `results` to `benchmarks/results/NAME.json` together with what they were run on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    return path


def update(name: str, key: str, results: list[dict[str, Any]], order: Iterable[str]) -> Path:
    """As `save`, and keeps rows of the file that compare: same machine and versions.

    A kept row of another commit names it, as "commit".

    Args:
        name: of the file.
        key: what tells rows apart; earlier rows with the same value are replaced.
        results: rows.
        order: values of `key` as they are to come in the file.
    """
    path, told = RESULTS / f"{name}.json", {row[key] for row in results}
    now = environment()
    earlier = json.loads(path.read_text()) if path.is_file() else {"environment": {}}
    then = earlier["environment"]
    if {**then, "commit": now["commit"]} == now:
        other = {} if then["commit"] == now["commit"] else {"commit": then["commit"]}
        results = results + [other | row for row in earlier["results"] if row[key] not in told]
    places = list(order)
    return save(name, sorted(results, key=lambda row: places.index(row[key])))


def gpu() -> str:
    """Short name of the GPU as file names have it, such as "h200" or "rtx4090"; no dash in it."""
    name = torch.cuda.get_device_name()
    model = re.search(r"(RTX )?[A-Z]*\d\w*", name)
    return (model[0] if model else name.split()[-1]).replace(" ", "").replace("-", "").lower()


def environment() -> dict[str, Any]:
    """Processor, versions and commit."""
    packages = ("torch", "triton", "diffusers", "transformers", "timm", "gna-compile")
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted changes": bool(_git("status", "--porcelain", "--", "gna_compile", "csrc")),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["versions"] |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What git prints; "" without git or outside of a repository."""
    here = Path(__file__).parent
    try:
        run = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout.strip()
