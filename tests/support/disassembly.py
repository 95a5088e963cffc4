"""The machine code of a cubin, by nvdisasm: the toolkit's, or that of the package nvidia-cuda-nvdisasm."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest


def functions_of(cubin: Path) -> dict[str, list[str]]:
    """The instructions of each kernel; skips the test where there is no disassembler."""
    packaged = sorted(Path(sysconfig.get_path("platlib")).glob("nvidia/cu*/bin/nvdisasm"))
    disassembler = shutil.which("nvdisasm") or (str(packaged[-1]) if packaged else None)
    if disassembler is None:
        pytest.skip("needs nvdisasm")
    text = subprocess.run(
        [disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    functions: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if found := re.search(r"\.section\s+\.text\.(\w+)", line):
            name = found[1]
            functions[name] = []
        elif name and (found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);?\s*(?:/\*|;|$)", line)):
            functions[name].append(found[1])
    return functions
