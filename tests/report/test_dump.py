"""`GNA_DUMP`: a numbered folder for each compiled graph, whole or not there."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_net import PHASED, Net, image, policy

import gna_compile
from gna_compile.report import dump
from gna_compile.report.collect import GraphRecord

WRITE_MANY = """
import sys
from pathlib import Path
from gna_compile.report.collect import GraphRecord
from gna_compile.report.dump import write

for i in range(25):
    write(GraphRecord([], f"{sys.argv[2]} {i}"), Path(sys.argv[1]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    into = tmp_path / "made" / "when needed"
    monkeypatch.setenv("GNA_DUMP", str(into))
    return into


def run(rules: dict[str, Any]) -> None:
    options: dict[str, Any] = {"policy": rules, "inner": "eager"}
    with torch.no_grad():
        torch.compile(Net(), backend="gna", options=options)(image())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_graph_gets_its_decisions_and_what_the_rewrite_changed(folder: Path) -> None:
    run(policy())
    assert names(folder) == ["0000"]
    assert names(folder / "0000") == [
        "after-0.txt",
        "before.txt",
        "change-0.diff",
        "decisions.json",
    ]
    decisions = json.loads((folder / "0000" / "decisions.json").read_text())
    assert decisions["process"] == os.getpid()
    assert decisions["variant_of_phase"] == {"default": 0}
    assert [site["layer"] for site in decisions["sites"]] == ["blocks.0.attn", "blocks.1.attn"]
    assert {site["decision"] for site in decisions["sites"]} == {"gna"}
    before, after = ((folder / "0000" / f"{x}.txt").read_text() for x in ("before", "after-0"))
    assert "scaled_dot_product_attention" in before
    assert "gna.attention" in after
    assert "scaled_dot_product_attention" not in after
    diff = (folder / "0000" / "change-0.diff").read_text()
    expected = gna_compile.graph_diff(Net(), image(), policy=policy())
    assert diff == expected + "\n"


def test_each_variant_of_a_policy_with_phases_is_written(folder: Path) -> None:
    run(PHASED)
    decisions = json.loads((folder / "0000" / "decisions.json").read_text())
    assert decisions["variant_of_phase"] == {"default": 0, "warmup": 1}
    changes = [(folder / "0000" / f"change-{variant}.diff").read_text() for variant in (0, 1)]
    assert "gna.attention" in changes[0]
    assert changes[1] == "\n"


def test_a_graph_that_stays_dense_has_no_change(folder: Path) -> None:
    run(policy({"dense": True}))
    assert names(folder / "0000") == ["before.txt", "decisions.json"]
    decisions = json.loads((folder / "0000" / "decisions.json").read_text())
    assert decisions["variant_of_phase"] == {}
    assert {site["reason"] for site in decisions["sites"]} == {"rule-dense"}


def test_numbers_go_on_from_the_highest(folder: Path) -> None:
    for taken in ("0002", "0007", "notes"):
        (folder / taken).mkdir(parents=True)
        (folder / taken / "file").touch()
    (folder / "9").touch()
    run(policy())
    assert names(folder) == ["0002", "0007", "0010", "9", "notes"]


def test_a_number_that_is_taken_meanwhile_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dump.write(GraphRecord([], "first"), tmp_path)
    (tmp_path / "0001").touch()
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))
    assert dump.write(GraphRecord([], "second"), tmp_path).name == "0002"
    assert (first / "before.txt").read_text() == "first\n"


def test_an_interruption_leaves_no_half_written_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path.write_text

    def interrupted(self: Path, text: str) -> int:
        if self.name == "before.txt":
            raise KeyboardInterrupt
        return whole(self, text)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dump.write(GraphRecord([], "lost"), tmp_path)
    assert names(tmp_path) == []
    assert dump.write(GraphRecord([], "kept"), tmp_path).name == "0000"


def test_processes_share_a_folder(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITE_MANY, str(tmp_path), name])
        for name in ("a", "b", "c")
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert names(tmp_path) == [f"{number:04d}" for number in range(75)]
    found = sorted((path / "before.txt").read_text() for path in tmp_path.iterdir())
    assert found == sorted(f"{name} {i}\n" for name in "abc" for i in range(25))


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GNA_DUMP", str(tmp_path / "file" / "folder"))
    with caplog.at_level(logging.WARNING, "gna_compile"):
        run(policy())
    assert "GNA_DUMP" in caplog.text
    assert "a graph was not written" in caplog.text


@pytest.mark.parametrize("value", [None, ""])
def test_nothing_is_written_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GNA_DUMP", raising=False)
    if value is not None:
        monkeypatch.setenv("GNA_DUMP", value)
    run(policy())
    assert names(tmp_path) == []
