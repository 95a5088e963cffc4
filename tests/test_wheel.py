"""The wheel: built, installed outside the checkout, and used on a machine without a compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_wheel_needs_neither_checkout_nor_compiler(tmp_path: Path) -> None:
    """One test, as several would each build a wheel where they run in parallel."""
    wheel = built(tmp_path / "dist")
    it_holds_the_policies_and_the_native_module(wheel)
    programs = installed(wheel, tmp_path / "venv")
    the_first_example_runs(programs, tmp_path)
    the_command_lists_the_policies(programs, tmp_path)


def built(folder: Path) -> Path:
    """A wheel of the checkout, without the CUDA kernels, which take minutes to compile."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    command += [f"--outdir={folder}", f"--config-setting=build-dir={folder}/build", str(CHECKOUT)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run(command, {**os.environ, "PATH": path, "GNA_CUDA": "0"}, folder.parent)
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed(wheel: Path, root: Path) -> Path:
    """The programs of an environment with the wheel in it and the packages of this one in sight."""
    run([sys.executable, "-m", "venv", "--without-pip", str(root)], os.environ, root.parent)
    python = root / "bin" / "python"
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", str(wheel)], os.environ, root.parent)
    site = next(root.glob("lib/python*/site-packages"))
    seen = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "packages-around.pth").write_text("\n".join(seen) + "\n")
    return root / "bin"


def run(command: list[str], environment: Mapping[str, str], folder: Path) -> str:
    result = subprocess.run(
        command, cwd=folder, env=dict(environment), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def alone(programs: Path) -> dict[str, str]:
    """An environment in which there is no compiler, and nothing but the wheel's programs."""
    kept = {"HOME", "TMPDIR", "LD_LIBRARY_PATH", "LANG"}
    return {name: value for name, value in os.environ.items() if name in kept} | {
        "PATH": str(programs)
    }


def it_holds_the_policies_and_the_native_module(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {f"gna_compile/policies/{path.name}" for path in (CHECKOUT / "policies").iterdir()}
    assert "gna_compile/policies/flux-4k.yaml" in shipped
    assert shipped <= set(names)
    assert "gna_compile/py.typed" in names
    assert any(re.fullmatch(r"gna_compile/_native\..*\.so", name) for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/"))]


def the_first_example_runs(programs: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.S)
    example = next(block for block in blocks if "import torch\n" in block)
    options = 'options={"policy": policy}'
    assert options in example
    example = example.replace(options, 'options={"policy": policy, "inner": "eager"}')
    example += """
import gna_compile
from gna_compile import _native
from gna_compile.providers.cpu.provider import instruction_sets

print(gna_compile.__file__, _native.__file__, instruction_sets() != [], tuple(video.shape))
"""
    printed = run([str(programs / "python"), "-c", example], alone(programs), tmp_path)
    package, native, has_kernel, shape = printed.strip().splitlines()[-1].split(" ", 3)
    for file in (package, native):
        assert Path(file).is_relative_to(programs.parent)
    assert (has_kernel, shape) == ("True", "(1, 16, 8, 48, 64)")


def the_command_lists_the_policies(programs: Path, tmp_path: Path) -> None:
    printed = run([str(programs / "gna"), "policies", "list"], alone(programs), tmp_path)
    for path in (CHECKOUT / "policies").iterdir():
        assert path.stem in printed
