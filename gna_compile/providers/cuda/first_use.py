"""The self-test of a native kernel at its first use on a GPU model that it is not tested on.

A separate process runs small problems through the kernel and compares them with the portable
provider: a kernel that hangs or corrupts its context takes that process along and no other. What
came of it is kept on disk, by GPU model, driver and the kernel's library, so it costs a few seconds
once; a process that never got to the kernel (no memory left on the GPU, a GPU that takes one process
only) says nothing of the kernel and is tried again by the next process.

In the environment, `GNA_FIRST_USE_CHECK=0` turns the check off, and `GNA_CACHE_DIR` is where results
are kept instead of `gna-compile` in `$XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from gna_compile.planner import ARCHITECTURES

log = logging.getLogger("gna_compile")

SWITCH = "GNA_FIRST_USE_CHECK"
CACHE = "GNA_CACHE_DIR"
TIMEOUT = 120.0  # seconds, most of them for importing torch and starting CUDA

READY = "the kernel's turn"
"""What the process prints once everything but the kernel has been seen to work."""

_DRIVER = Path("/proc/driver/nvidia/version")


class Outcome(NamedTuple):
    """What came of a check.

    Attributes:
        failure: what went wrong, or None.
        is_of_the_kernel: whether the kernel had its turn; only then does the outcome say anything
            of it.
    """

    failure: str | None
    is_of_the_kernel: bool


@cache
def failure(provider: str, library: str, device: int) -> str | None:
    """Why the kernels of `library` must not be used on this CUDA device, or None if they may.

    Args:
        provider: name of the provider that launches them.
        library: path of the shared library that they are in.
        device: index of the CUDA device.
    """
    gpu = torch.cuda.get_device_name(device)
    if gpu in ARCHITECTURES[provider].tested_on or os.environ.get(SWITCH) == "0":
        return None
    known = _cache() / f"first-use-{provider}-{_key(gpu, Path(library))}.json"
    try:
        found = Outcome(json.loads(known.read_text())["failure"], True)
    except (OSError, ValueError, KeyError, TypeError):
        found = run(command(provider, f"cuda:{device}"), TIMEOUT)
        if found.is_of_the_kernel:
            _keep(known, gpu, found.failure)
    if found.failure is None:
        return None
    if found.is_of_the_kernel:
        reason = f"its check on {gpu} failed: {found.failure} (kept in {known}; delete it to check again)"
    else:
        reason = (
            f"it could not be checked on {gpu}: {found.failure}: set {SWITCH}=0 to skip the check"
        )
    log.warning("gna-compile does not use %s here: %s", provider, reason)
    return reason


def command(provider: str, device: str) -> list[str]:
    """What runs the check of a provider on a device such as "cuda:1"."""
    return [sys.executable, "-m", "gna_compile.self_check", provider, device]


def run(command: Sequence[str], timeout: float) -> Outcome:
    """Runs the check in a separate process, for at most `timeout` seconds."""
    environment = {**os.environ, SWITCH: "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    except OSError as error:
        return Outcome(f"it could not be started ({error})", False)
    try:
        printed, _ = process.communicate(timeout=timeout)
        wrong = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired as expired:
        process.kill()
        # Not waited for: a process that the driver holds on to does not die.
        printed, wrong = expired.output or b"", f"no result within {timeout:g} s"
    before, ready, after = printed.decode(errors="replace").partition(READY)
    if process.returncode == 0:
        return Outcome(None, True)
    lines = (after if ready else before).strip().splitlines()
    if process.returncode is not None and lines:
        wrong = lines[-1]
    return Outcome(wrong, bool(ready))


def _key(gpu: str, library: Path) -> str:
    digest = hashlib.sha256(library.read_bytes())
    driver = _DRIVER.read_text() if _DRIVER.exists() else ""
    for part in (gpu, driver):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _cache() -> Path:
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE])
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers
        base = os.devnull  # where nothing can be kept
    return Path(base) / "gna-compile"


def _keep(path: Path, gpu: str, found: str | None) -> None:
    """Best effort: without a place to write, the next process checks again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"gpu": gpu, "failure": found}, file)
        Path(file.name).replace(path)
    except OSError:
        pass
