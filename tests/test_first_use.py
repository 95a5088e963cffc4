"""A kernel's check on an unproven GPU: what it finds, and that nothing of it reaches the caller."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gna_compile import providers
from gna_compile.providers import first_use
from gna_compile.providers.portable import Portable


class Wrong(Portable):
    """Off by a half in three columns."""

    name = "wrong"

    def forward(self, *args: Any) -> None:
        super().forward(*args)
        output: Tensor = args[6]
        output[..., :3] += 0.5


@pytest.fixture
def _card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA B200")
    monkeypatch.setenv(first_use.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(first_use.SWITCH, raising=False)
    first_use.failure.cache_clear()


def test_a_right_kernel_passes_and_a_wrong_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_use.check("portable", "cpu") is None
    monkeypatch.setattr(providers, "PROVIDERS", [Wrong(), Portable()])
    assert "output of torch.bfloat16, head size 64" in (first_use.check("wrong", "cpu") or "")


def test_the_process_reports_hangs_and_crashes() -> None:
    assert first_use.run([sys.executable, "-c", ""], 60) is None
    assert (
        first_use.run([sys.executable, "-c", "import sys; sys.exit('all zero')"], 60) == "all zero"
    )
    killed = "import os; os.kill(os.getpid(), 9)"
    assert first_use.run([sys.executable, "-c", killed], 60) == "exit code -9"
    start = time.monotonic()
    hangs = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert first_use.run(hangs, 0.5) == "no result within 0.5 s"
    assert time.monotonic() - start < 60
    assert "could not be started" in (first_use.run(["/no/such/python"], 60) or "")


@pytest.mark.usefixtures("_card")
def test_a_result_is_kept_by_library_and_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []
    results = ["logsumexp of torch.float16, head size 64: relative error nan", None]

    def run(command: list[str], timeout: float) -> str | None:
        asked.append(command)
        return results[len(asked) - 1]

    monkeypatch.setattr(first_use, "run", run)
    library = tmp_path / "_sm100.so"
    library.write_bytes(b"first build")
    for _ in range(2):
        first_use.failure.cache_clear()
        with pytest.warns(UserWarning, match="does not use sm100 here"):
            reason = first_use.failure("sm100", str(library), 1)
        assert "NVIDIA B200 failed: logsumexp" in (reason or "") and "delete it" in (reason or "")
    assert [command[-2:] for command in asked] == [["sm100", "1"]]

    library.write_bytes(b"second build")
    first_use.failure.cache_clear()
    assert first_use.failure("sm100", str(library), 1) is None
    kept = [json.loads(path.read_text()) for path in (tmp_path / "cache").iterdir()]
    assert sorted(bool(entry["failure"]) for entry in kept) == [False, True]


@pytest.mark.usefixtures("_card")
def test_proven_cards_and_the_switch_skip_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "run", lambda *_: "must not run")
    monkeypatch.setenv(first_use.SWITCH, "0")
    assert first_use.failure("sm100", "/nowhere", 0) is None
    monkeypatch.delenv(first_use.SWITCH)
    first_use.failure.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    assert first_use.failure("sm90", "/nowhere", 0) is None
