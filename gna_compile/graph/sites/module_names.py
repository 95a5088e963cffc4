"""Layer names: from what Dynamo writes on a node to the name that `named_modules()` would give."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class ModuleRef:
    """A module that an FX node was traced inside.

    Args:
        id: `id()` of the module that was traced, 0 where it is not known.
        name: fully qualified name relative to the compiled module, "" for that module itself.
        cls: name of the module's type.
    """

    id: int
    name: str
    cls: str


_ROOT = re.compile(r"^[LG]\[(?:'[^']*'|\"[^\"]*\")\]")
_STEP = re.compile(
    r"\.(?P<attribute>[^.\[\]]+)|\[(?:'(?P<one>[^']*)'|\"(?P<two>[^\"]*)\"|(?P<at>-?\d+))\]"
)
# Dynamo's own way to a module's children, and the wrappers that torch puts around a module.
_TRANSPARENT = frozenset(
    {
        "__dict__",
        "_modules",
        "__self__",
        "__func__",
        "__wrapped__",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
    }
)
# Ways into a function's captured variables: the module tree starts behind them.
_CAPTURE = frozenset({"__closure__", "__defaults__", "__kwdefaults__", "__globals__"})


def qualified_name(path: str) -> str:
    """The layer name in one of Dynamo's paths, e.g. "blocks.0.attn" from "L['self'].blocks.0.attn".

    Drops the variable that holds the model (local, global, closure cell, default argument, element
    of a list), the detours through `__dict__['_modules']`, and torch's wrappers (`_orig_mod` of
    `torch.compile`, FSDP, activation checkpointing). A path of an unknown form is returned as it is.
    """
    root = _ROOT.match(path)
    steps: list[str] = []
    leading = root is not None
    captured = False
    position = root.end() if root else 0
    if not root:
        path = "." + path if path and path[0] not in ".[" else path
    while position < len(path):
        match = _STEP.match(path, position)
        if match is None:
            return path.lstrip(".")
        position = match.end()
        index = match["at"]
        if index is not None:
            # A list that holds the model: the index is no part of the model's own names.
            if not leading:
                steps.append(index)
            continue
        step = next(s for s in (match["attribute"], match["one"], match["two"]) if s is not None)
        if step in _CAPTURE or step == "cell_contents":
            steps, leading, captured = [], True, step == "__kwdefaults__" or step == "__globals__"
        elif captured:
            captured = False
        elif step not in _TRANSPARENT:
            steps.append(step)
            leading = False
    return ".".join(steps)


def modules_of(node: fx.Node) -> tuple[ModuleRef, ...]:
    """The modules that `node` was traced inside, outermost first; () if Dynamo recorded none."""
    stack = node.meta.get("nn_module_stack")
    if not isinstance(stack, Mapping):
        return ()
    modules = []
    for key, (path, cls) in stack.items():
        identity = str(key).split("@")[0]
        type_name = cls.rpartition(".")[2] if isinstance(cls, str) else cls.__name__
        modules.append(
            ModuleRef(int(identity) if identity.isdigit() else 0, qualified_name(path), type_name)
        )
    return tuple(modules)


def rebase(
    modules: tuple[ModuleRef, ...],
    old: tuple[ModuleRef, ...],
    new: tuple[ModuleRef, ...],
) -> tuple[ModuleRef, ...]:
    """`modules`, recorded inside a call made from `old`, as they are inside a call made from `new`.

    Subgraphs that several layers share carry the names of one of them only. The modules below
    the caller get `id` 0, since only the traced one's is known.
    """
    if not old or not new:
        return new or modules
    before, after = old[-1].name, new[-1].name
    if before == after:
        return modules
    prefix = before + "." if before else ""
    inner = [
        ModuleRef(0, ".".join(part for part in (after, ref.name[len(prefix) :]) if part), ref.cls)
        for ref in modules
        if ref.name.startswith(prefix) and ref.name != before
    ]
    return new + tuple(inner)
