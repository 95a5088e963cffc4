"""`prepare`: makes policy and token layout part of what Dynamo guards on.

`torch.compile` erases layer names when it compiles block by block, and it never looks at the values
of a tensor. So each attention module gets a `Stamp`, and a forward pre-hook reads the stamp's key
while it is traced: Dynamo then guards on the key, layers with different rules get different graphs,
and layers with the same rule share one.

Models whose latents are packed (FLUX) show their grid only in the values of `img_ids`. For them
`prepare` also hooks the model itself: outside of any graph, the hook reads a new `img_ids` tensor
once and keeps the grid where the layers' hook finds it (`packed_grid.py`).
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn

from gna_compile.graph.position_ids import SeenIds
from gna_compile.packed_grid import PackedGrid, mark
from gna_compile.policy import DeclaredLayout, Policy, load_policy

log = logging.getLogger("gna_compile")

ModuleT = TypeVar("ModuleT", bound=nn.Module)

KEY = "_gna_key"
PACKED = "_gna_packed"
_STAMP = "_gna_stamp"
_IDS = "img_ids"
_SEEN = "_gna_seen_ids"
_LOOKS_LIKE_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_PROJECTIONS = {"to_q", "to_qkv", "q_proj", "qkv", "query", "q", "wq", "Wqkv", "in_proj"}


@dataclass(frozen=True)
class Stamp:
    """What `prepare` knows about one attention module.

    Attributes:
        policy: the policy it was prepared with.
        name: its qualified name in the prepared model.
        classes: class names of the modules from the model down to it.
        layout: the layout of its tokens that `prepare` was given, if any.
        packed: the grid that the model's position ids show at present, if it has any.
    """

    policy: Policy
    name: str
    classes: tuple[str, ...]
    layout: DeclaredLayout | None
    packed: PackedGrid | None = None

    @property
    def key(self) -> str:
        """Equal for layers that the policy treats alike whatever their tokens are."""
        rules = self.policy.signature(self.name, self.classes)
        parts = (self.policy.fingerprint, rules, self.layout)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def prepare(
    model: ModuleT,
    policy: str | PathLike[str] | Mapping[str, Any] | Policy,
    layout: Mapping[str, Any] | DeclaredLayout | None = None,
) -> ModuleT:
    """Stamps the attention modules of `model`, in place, and returns it.

    Needed for regional compilation (`model.compile_repeated_blocks(backend="gna")`,
    `block.compile(backend="gna")`) and for packed latents; allowed everywhere. A prepared model
    needs no `policy` option, so `torch.compile(model, backend="gna", mode=...)` works too.

    Prepare a model before it is first called compiled: Dynamo does not look for hooks added later.
    From then on, call `prepare` again to change policy or layout: layers whose rule or layout
    changed are recompiled. The grid of packed latents belongs to the model, so threads that share a
    prepared model must run one grid at a time, and activation checkpointing must recompute with
    the grid of the forward pass. Graphs treat its height and width as sizes of a tensor:
    `torch.compile` makes those dynamic that have changed once. Call the model itself:
    `model.forward(...)` passes by the hook that reads the ids.

    The stamps are plain attributes and the hooks plain functions: `pickle`, `copy.deepcopy` and
    `state_dict` work as before, and `unprepare` removes everything.

    Args:
        model: any module; its parameters are not touched.
        policy: a shipped policy's name, a path, a dict, or a loaded `Policy`.
        layout: how the tokens lie on the grid, as a policy's `layout` key has it; overrides it.

    Raises:
        PolicyError: if the policy or the layout is malformed.
    """
    policy = load_policy(policy)
    declared = _parse_layout(layout)
    earlier = {m: m.__dict__[PACKED] for m in model.modules() if PACKED in m.__dict__}
    unprepare(model)
    for module in model.modules():
        if _IDS in inspect.signature(module.forward).parameters:
            module.register_forward_pre_hook(_follow_ids, with_kwargs=True)
            packed = _shared_grid(module, earlier) or PackedGrid()
            for inner in module.modules():
                inner.__dict__[PACKED] = packed
    for module, stamps in _stamps(model, policy, declared).items():
        if len({stamp.key for stamp in stamps}) > 1:
            log.warning(
                "%s are one module, but the policy has different rules for them: it stays dense. "
                "Give them one rule.",
                " and ".join(stamp.name for stamp in stamps),
            )
            continue
        module.__dict__[_STAMP] = stamps[0]
        module.__dict__[KEY] = stamps[0].key
        module.register_forward_pre_hook(_read_key)
    _warn_of_recompile_limit(model)
    return model


def _shared_grid(model: nn.Module, earlier: Mapping[nn.Module, PackedGrid]) -> PackedGrid | None:
    """That of another model with the same layers, which each call of either then sets."""
    around = model.__dict__.get(PACKED)
    for module in model.modules():
        for packed in (earlier.get(module), module.__dict__.get(PACKED)):
            if packed is not None and packed is not around:
                return packed
    return None


def _parse_layout(layout: Mapping[str, Any] | DeclaredLayout | None) -> DeclaredLayout | None:
    if layout is None or isinstance(layout, DeclaredLayout):
        return layout
    # A policy's own `layout` key goes through the same checks.
    probe = {"version": 1, "layout": dict(layout), "rules": [{"dense": True}]}
    return load_policy(probe).layout


def unprepare(model: ModuleT) -> ModuleT:
    """Removes every stamp and hook that `prepare` put on `model`, in place, and returns it."""
    for module in model.modules():
        module.__dict__.pop(_STAMP, None)
        module.__dict__.pop(KEY, None)
        module.__dict__.pop(PACKED, None)
        module.__dict__.pop(_SEEN, None)
        for handle, hook in list(module._forward_pre_hooks.items()):
            if hook in (_read_key, _follow_ids):
                del module._forward_pre_hooks[handle]
                module._forward_pre_hooks_with_kwargs.pop(handle, None)
    return model


def stamp_of(module: nn.Module | None) -> Stamp | None:
    """The stamp on `module`, if it has one."""
    return None if module is None else module.__dict__.get(_STAMP)


def stamps_below(roots: Iterable[nn.Module]) -> dict[int, Stamp]:
    """All stamps below these modules, by `id` of the module that carries them."""
    modules = (module for root in roots for module in root.modules())
    return {id(m): stamp for m in modules if (stamp := stamp_of(m)) is not None}


def _read_key(module: nn.Module, args: Any) -> None:
    # The comparison is what makes Dynamo guard on the value.
    if module.__dict__[KEY] == "":
        raise AssertionError("a stamped module has a key")
    packed = module.__dict__.get(PACKED)
    if packed is not None and torch.compiler.is_dynamo_compiling():
        mark(packed)


@torch.compiler.disable
def _follow_ids(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keeps the grid that the position ids of packed latents show."""
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    ids = bound.arguments.get(_IDS)
    if not isinstance(ids, torch.Tensor):
        module.__dict__[PACKED].show(None)
        return
    seen = module.__dict__.setdefault(_SEEN, SeenIds())
    module.__dict__[PACKED].show(seen.grid(ids))


@torch.compiler.substitute_in_graph(_follow_ids, skip_signature_check=True)
def _follow_ids_when_inlined(module: Any, args: Any, kwargs: Any) -> None:
    """Inside a larger graph nothing can be read; only ids among its inputs show the grid there."""
    return


def show_grid(model: nn.Module, grid: tuple[int, ...] | None) -> bool:
    """Makes guards see that position ids show this grid; whether `model` is prepared for any."""
    grids = {packed for module in model.modules() if (packed := module.__dict__.get(PACKED))}
    for packed in grids:
        # A graph that was made while this grid was shown, but for other ids, must go, too.
        packed.show(None if packed.grid == grid else grid)
    return bool(grids)


def _stamps(
    model: nn.Module, policy: Policy, declared: DeclaredLayout | None
) -> dict[nn.Module, list[Stamp]]:
    """The stamps of every module that may hold an attention site, one for each of its names."""
    named = dict(model.named_modules(remove_duplicate=False))
    chosen = {name for name, module in named.items() if _is_attention(module)}
    for parent, module in named.items():
        if isinstance(module, nn.ModuleList):
            for index in range(len(module)):
                name = f"{parent}.{index}" if parent else str(index)
                if not any(other == name or other.startswith(f"{name}.") for other in chosen):
                    chosen.add(name)
    stamps: dict[nn.Module, list[Stamp]] = defaultdict(list)
    for name, module in named.items():
        if name in chosen:
            packed = module.__dict__.get(PACKED)
            stamps[module].append(Stamp(policy, name, class_stack(named, name), declared, packed))
    return stamps


def class_stack(named: Mapping[str, nn.Module], name: str) -> tuple[str, ...]:
    """Class names of the modules from the root down to `name`."""
    parts = name.split(".") if name else []
    paths = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
    return tuple(type(named[path]).__name__ for path in paths if path in named)


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return False
    if _LOOKS_LIKE_ATTENTION.search(type(module).__name__):
        return True
    return any(child in _PROJECTIONS for child, _ in module.named_children())


def _warn_of_recompile_limit(model: nn.Module) -> None:
    from torch._dynamo import config

    graphs: dict[type, set[tuple[str, ...]]] = defaultdict(set)
    for blocks in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
        for block in blocks:
            keys = tuple(m.__dict__[KEY] for m in block.modules() if stamp_of(m) is not None)
            graphs[type(block)].add(keys)
    for block_class, combinations in graphs.items():
        if len(combinations) > config.recompile_limit:
            log.warning(
                "%s has %d different combinations of rules, more than "
                "torch._dynamo.config.recompile_limit = %d: compiled block by block, the rest "
                "would silently run eagerly. Raise the limit, or compile the whole model.",
                block_class.__name__,
                len(combinations),
                config.recompile_limit,
            )
