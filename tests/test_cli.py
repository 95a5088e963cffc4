"""The `gna` command as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gna_compile.cli import app
from gna_compile.policy import shipped_policies

BUILD = """
import torch
from helper import ViT

def make():
    return ViT(), {"x": torch.randn(1, 8, 40, 40)}

def wrong():
    return ViT(), torch.randn(1)
"""
HELPER = """
import torch

class ViT(torch.nn.Module):
    def forward(self, x):
        x = x.flatten(2).transpose(1, 2).unsqueeze(1)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "build_model.py").write_text(BUILD)
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "my.yaml").write_text("version: 1\nrules: [{window: 9}]\n")
    (tmp_path / "bad.yaml").write_text("version: 1\nrules:\n  - windw: 9\n")
    (tmp_path / "[odd].yaml").write_text("version: 1\nrules: [{windw: 9}]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, fails: bool = False) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == int(fails), result.output
    return result.output


def test_explain(folder: Path) -> None:
    output = run("explain", "build_model.py:make", "--policy", "my.yaml")
    assert "gna 9x9 / 1x1" in output
    assert "1 attention sites: 1 rewritten" in output
    rows = json.loads(run("explain", "build_model.py:make", "--policy", "my.yaml", "--json"))
    assert [(row["layout"], row["decision"]) for row in rows] == [("40x40", "gna")]
    diff = run("explain", "build_model.py:make", "--policy", "my.yaml", "--diff")
    assert "gna.attention.v2" in diff


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "build_model.py:make", "--policy", "nope.yaml"], "nope.yaml"),
        (["explain", "build_model.py:make", "--policy", "flux-4"], "flux-4k"),
        (["explain", "build_model.py:wrong"], "kwargs as a dict, not tuple and Tensor"),
        (["explain", "build_model.py:other"], "no function 'other'"),
        (["explain", "none.py:make"], "existing file"),
        (["policies", "check", "bad.yaml"], "bad.yaml:3: rules[0].windw"),
        (["policies", "check", "[odd].yaml"], "[odd].yaml:2"),
        (["policies", "check", "my.yaml", "--grid", "8,8"], "9"),
        (["policies", "check", "my.yaml", "--grid", "8,x"], "8,x"),
        (["policies", "show", "nope"], "nope"),
    ],
)
def test_mistakes_are_one_clear_message(folder: Path, arguments: list[str], message: str) -> None:
    output = run(*arguments, fails=True)
    assert message in output
    assert "Traceback" not in output


def test_policies(folder: Path) -> None:
    assert run("policies", "list").split() == list(shipped_policies())
    assert "window: [80, 80]" in run("policies", "show", "flux-4k")
    assert "ok, 1 rules" in run("policies", "check", "my.yaml", "--grid", "40,40")
    assert json.loads(run("policies", "schema"))["title"]


def test_doctor() -> None:
    output = run("doctor")
    assert "backend 'gna' registered: yes" in output
    assert "  prepare: ok (InstructionTranslator, current_tx, frame, install_guard" in output
    assert "provider portable on cpu: usable" in output
    assert "provider cpu on cpu: usable" in output
    assert "CPU kernel: " in output
    assert "provider sm90 on cuda: " in output
    assert "sm90: tested on NVIDIA H100" in output
    assert "sm100: executed by the PTX interpreter, on no GPU yet" in output
