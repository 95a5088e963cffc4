"""The `gna` command: explain a model, look at policies, check the installation."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from gna_compile.policy import (
    PolicyError,
    json_schema,
    load_policy,
    policy_text,
    shipped_policies,
)
from gna_compile.simulate import simulate

if TYPE_CHECKING:
    from gna_compile.providers import Problem

app = typer.Typer(help="Neighborhood attention for unmodified models.", no_args_is_help=True)
policies_app = typer.Typer(help="List, show and check policies.", no_args_is_help=True)
app.add_typer(policies_app, name="policies")
app.command()(simulate)

console = Console()
errors = Console(stderr=True)


def _fail(message: object) -> typer.Exit:
    errors.print(f"[red]error:[/red] {escape(str(message))}", highlight=False, soft_wrap=True)
    return typer.Exit(1)


@app.command()
def explain(
    target: Annotated[
        str,
        typer.Argument(
            help="path/to/file.py:function; the function takes nothing and returns "
            "(model, args, kwargs) or (model, kwargs)"
        ),
    ],
    policy: Annotated[
        str | None,
        typer.Option(help="A shipped policy's name, or a path. Not needed for a prepared model."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Print the graph diff instead.")] = False,
) -> None:
    """Says what becomes of every attention site of a model, without lowering anything."""
    from gna_compile.report.explain import explain as explain_model
    from gna_compile.report.explain import graph_diff

    model, args, kwargs = _build(target)
    try:
        if diff:
            print(graph_diff(model, *args, policy=policy, **kwargs))
            return
        result = explain_model(model, *args, policy=policy, quiet=True, **kwargs)
    except PolicyError as error:
        raise _fail(error) from None
    if as_json:
        print(result.to_json())
    else:
        result.print(console)


def _build(target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    path, _, name = target.rpartition(":")
    if not path or not Path(path).is_file():
        raise _fail(f"{target!r} is not FILE.py:FUNCTION with an existing file")
    function = getattr(_load(Path(path)), name, None)
    if not callable(function):
        raise _fail(f"{path} has no function {name!r}")
    built = function()
    if not isinstance(built, tuple) or len(built) not in (2, 3):
        raise _fail(f"{name}() must return (model, args, kwargs) or (model, kwargs)")
    model, args, kwargs = built if len(built) == 3 else (built[0], (), built[1])
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
        raise _fail(
            f"{name}() must return args as a tuple and kwargs as a dict, not "
            f"{type(args).__name__} and {type(kwargs).__name__}"
        )
    return model, tuple(args), dict(kwargs)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


@policies_app.command("list")
def list_policies() -> None:
    """Names of the shipped policies."""
    for name in shipped_policies():
        print(name)


@policies_app.command("show")
def show(name: Annotated[str, typer.Argument(help="A shipped policy's name, or a path.")]) -> None:
    """Prints a policy's YAML."""
    try:
        print(policy_text(name), end="")
    except PolicyError as error:
        raise _fail(error) from None


@policies_app.command("check")
def check(
    file: Annotated[str, typer.Argument(help="A policy file, or a shipped policy's name.")],
    grid: Annotated[str, typer.Option(help="A token grid to check against: T,H,W")] = "",
) -> None:
    """Validates a policy; with --grid also that every window fits that token grid."""
    try:
        policy = load_policy(file)
        sizes = [int(size) for size in grid.split(",")] if grid else []
    except PolicyError as error:
        raise _fail(error) from None
    except ValueError:
        raise _fail(f"--grid {grid!r} must be 1 to 3 whole numbers, like 30,48,80") from None
    if sizes and (len(sizes) > 3 or min(sizes) < 1):
        raise _fail(f"--grid {grid!r} must be 1 to 3 numbers of at least 1")
    problems = policy.check(sizes) if sizes else []
    for problem in problems:
        errors.print(problem, highlight=False, soft_wrap=True, markup=False)
    if problems:
        raise typer.Exit(1)
    print(f"{file}: ok, {len(policy.rules)} rules, phases {', '.join(policy.phases)}")


@policies_app.command("schema")
def schema() -> None:
    """The JSON Schema of policy files, for editors."""
    print(json.dumps(json_schema(), indent=2))


@app.command()
def doctor() -> None:
    """Which torch and device this is, and which providers can be used here."""
    import torch

    from gna_compile import _torch
    from gna_compile.planner import ARCHITECTURES
    from gna_compile.providers import PROVIDERS
    from gna_compile.providers.cpu.provider import instruction_sets
    from gna_compile.providers.cuda.library import library

    if _torch.why_not("op") is None:
        import gna_compile.ops  # noqa: F401 - registers the op
    tested = _torch.untested()
    console.print(f"torch {torch.__version__}" + (f" ({tested})" if tested else ""))
    for feature, names in _torch.probes().items():
        console.print(f"  {feature}: {names}", highlight=False, soft_wrap=True)
    listed = "gna" in torch.compiler.list_backends()
    console.print(f"backend 'gna' registered: {'yes' if listed else 'no, reinstall gna-compile'}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            console.print(f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    else:
        console.print("no CUDA device")
    isas = ", ".join(instruction_sets())
    console.print(f"CPU kernel: {isas or 'not built; install g++ or clang++ and reinstall'}")
    built = ", ".join(name for name in ARCHITECTURES if library(name) is not None)
    console.print(f"CUDA kernels: {built or 'not built; reinstall with GNA_CUDA=1'}")
    for name, architecture in ARCHITECTURES.items():
        gpus = ", ".join(sorted(architecture.tested_on))
        where = f"tested on {gpus}" if gpus else "executed by the PTX interpreter, on no GPU yet"
        console.print(f"  {name}: {where}; its first use on another GPU model is checked")
    for provider in PROVIDERS:
        for device in sorted(provider.fast_on):
            reason = provider.supports(_probe(device))
            state = "usable" if reason is None else f"not usable: {reason}"
            console.print(f"provider {provider.name} on {device}: {state}")


def _probe(device: str) -> Problem:
    """A problem that every provider takes on its own device."""
    import torch

    from gna_compile.geometry import AttentionPattern, Neighborhood
    from gna_compile.providers import Problem

    strides = (128 * 64, 128 * 64, 64, 1)
    pattern = AttentionPattern.of_neighborhood(Neighborhood.of((128,), (64,)), 1)
    return Problem(device, torch.bfloat16, 1, 1, 1, 64, pattern, False, strides, strides, strides)


if __name__ == "__main__":
    app()
