"""A kernel's check on an unproven GPU: what it finds, and that nothing of it reaches the caller."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from gna_compile import providers, self_check
from gna_compile.providers import Forward, Inputs, Problem
from gna_compile.providers.cuda import first_use
from gna_compile.providers.cuda.first_use import Outcome
from gna_compile.providers.portable.provider import Portable


class Wrong(Portable):
    """Off by a half in three columns."""

    name = "wrong"

    def forward(self, problem: Problem, inputs: Inputs, results: Forward) -> None:
        super().forward(problem, inputs, results)
        results.output[..., :3] += 0.5


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA B200")
    monkeypatch.setenv(first_use.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(first_use.SWITCH, raising=False)
    first_use.failure.cache_clear()


def test_a_right_kernel_passes_and_a_wrong_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert self_check.check("portable", "cpu") is None
    monkeypatch.setattr(providers, "PROVIDERS", [Wrong(), Portable()])
    assert "output of torch.bfloat16, head_dim 64" in (self_check.check("wrong", "cpu") or "")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_process_reports_hangs_and_crashes() -> None:
    ready = f"print({first_use.READY!r}, flush=True); "
    assert first_use.run(python(ready), 60) == (None, True)
    exits = "import sys; sys.exit('all zero')"
    assert first_use.run(python(ready + exits), 60) == ("all zero", True)
    killed = "import os; os.kill(os.getpid(), 9)"
    assert first_use.run(python(ready + killed), 60) == ("exit code -9", True)
    start = time.monotonic()
    hangs = "import time; time.sleep(600)"
    assert first_use.run(python(ready + hangs), 5) == ("no result within 5 s", True)
    assert time.monotonic() - start < 60


def test_a_process_that_does_not_get_to_the_kernel_says_nothing_of_it() -> None:
    assert first_use.run(python("raise SystemExit('no memory')"), 60) == ("no memory", False)
    hangs = "import time; time.sleep(600)"
    assert first_use.run(python(hangs), 0.5) == ("no result within 0.5 s", False)
    missing = first_use.run(["/no/such/python"], 60)
    assert "could not be started" in (missing.failure or "") and not missing.is_of_the_kernel
    absent = first_use.run(first_use.command("portable", "cuda:77"), 120)
    assert absent.failure and not absent.is_of_the_kernel


def test_the_process_runs_the_check() -> None:
    assert first_use.run(first_use.command("portable", "cpu"), 120) == (None, True)
    unknown = first_use.run(first_use.command("absent", "cpu"), 120)
    assert "there is no provider 'absent'" in (unknown.failure or "") and unknown.is_of_the_kernel


@pytest.mark.usefixtures("_gpu")
def test_a_result_is_kept_by_library_and_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[list[str]] = []
    results = ["logsumexp of torch.float16, head_dim 64: relative error nan", None]

    def run(command: list[str], timeout: float) -> Outcome:
        asked.append(command)
        return Outcome(results[len(asked) - 1], True)

    monkeypatch.setattr(first_use, "run", run)
    library = tmp_path / "_sm100.so"
    library.write_bytes(b"first build")
    for _ in range(2):
        first_use.failure.cache_clear()
        caplog.clear()
        reason = first_use.failure("sm100", str(library), 1)
        assert "does not use sm100 here" in caplog.text
        assert "NVIDIA B200 failed: logsumexp" in (reason or "") and "delete it" in (reason or "")
    assert [command[-2:] for command in asked] == [["sm100", "cuda:1"]]

    library.write_bytes(b"second build")
    first_use.failure.cache_clear()
    assert first_use.failure("sm100", str(library), 1) is None
    kept = [json.loads(path.read_text()) for path in (tmp_path / "cache").iterdir()]
    assert sorted(bool(entry["failure"]) for entry in kept) == [False, True]


@pytest.mark.usefixtures("_gpu")
def test_what_is_not_of_the_kernel_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = tmp_path / "_sm100.so"
    library.write_bytes(b"a build")
    outcomes = [Outcome("no memory", False), Outcome(None, True)]
    monkeypatch.setattr(first_use, "run", lambda *_: outcomes.pop(0))
    assert first_use.failure("sm100", str(library), 0) is not None
    assert "could not be checked on NVIDIA B200: no memory" in caplog.text
    first_use.failure.cache_clear()
    assert first_use.failure("sm100", str(library), 0) is None
    assert not outcomes


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (first_use.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    path = first_use._cache() / "result.json"
    first_use._keep(path, "a GPU", None)
    with pytest.raises(NotADirectoryError):
        path.read_text()


@pytest.mark.usefixtures("_gpu")
def test_tested_gpus_and_the_switch_skip_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "run", lambda *_: "must not run")
    monkeypatch.setenv(first_use.SWITCH, "0")
    assert first_use.failure("sm100", "/nowhere", 0) is None
    monkeypatch.delenv(first_use.SWITCH)
    first_use.failure.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    assert first_use.failure("sm90", "/nowhere", 0) is None
