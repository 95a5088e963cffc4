"""`prepare`: makes policy and token layout part of what Dynamo guards on.

Regional compilation (block by block) erases layer names, and `torch.compile` never looks at the values
of a tensor. So each attention module gets an `Annotation`, and a forward pre-hook reads its key
while it is traced: Dynamo then guards on the key, layers with different rules get different graphs,
and layers with the same rule share one.

Models whose latents are packed (FLUX) show their grid only in the values of `img_ids`, and a grid that
is declared may be true of one call and not of the next. So `prepare` also hooks the model itself:
outside of any graph, the hook looks at the inputs of each call (`declared_grids.py`) and keeps the
grids where the layers' hook finds them (`packed_grid.py`).
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn

from gna_compile import _torch
from gna_compile.policy import DeclaredLayout, Policy, load_policy
from gna_compile.prepared.declared_grids import IDS, Watch
from gna_compile.prepared.packed_grid import PackedGrid, Segments, mark

log = logging.getLogger("gna_compile")

ModuleT = TypeVar("ModuleT", bound=nn.Module)

KEY = "_gna_key"
PACKED = "_gna_packed"
_ANNOTATION = "_gna_annotation"
WATCH = "_gna_watch"
_LOOKS_LIKE_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_PROJECTIONS = {"to_q", "to_qkv", "q_proj", "qkv", "query", "q", "wq", "Wqkv", "in_proj"}


@dataclass(frozen=True)
class Annotation:
    """What `prepare` knows about one attention module.

    Attributes:
        policy: the policy it was prepared with.
        name: its fully qualified name in the prepared model.
        classes: class names of the modules from the model down to it.
        layout: the layout of its tokens that `prepare` was given, if any.
        packed: the grids that the model's inputs show at present; None if nothing has to be seen.
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
    """Annotates the attention modules of `model`, in place, and returns it.

    Needed for regional compilation (`model.compile_repeated_blocks(backend="gna")`,
    `block.compile(backend="gna")`) and for packed latents; allowed everywhere. A prepared model
    needs no `policy` option, so `torch.compile(model, backend="gna", mode=...)` works too.

    Prepare a model before it is first called compiled: Dynamo does not look for hooks added later.
    From then on, call `prepare` again to change policy or layout: layers whose rule or layout
    changed are recompiled.

    A declared grid, by `layout` or by the policy, is held against the inputs of each call: position
    ids, the shape of the latent, or arguments that are its sizes. The first call must agree with
    it; for another size the grid that follows from the same patches counts. Where none follows,
    attention stays dense, with a warning. Where no input shows sizes, what is declared holds until
    the shape of the tokens, or an argument that is a size, changes.

    The grids belong to the model, so threads that share a prepared model must run one size at a
    time, and activation checkpointing must recompute with the size of the forward pass. Graphs
    treat them as sizes of a tensor: `torch.compile` makes those dynamic that have changed once.
    Call the model itself: `model.forward(...)` passes by the hook that looks at its inputs, and so
    does a larger graph, in which a declared grid counts only where the graph shows it, too.

    The annotations are plain attributes and the hooks plain functions: `pickle`, `copy.deepcopy` and
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
    why = _torch.why_not("prepare")
    if why is not None:
        log.warning("%s: %s", why, _torch.FEATURES["prepare"])
    earlier = {m: m.__dict__[PACKED] for m in model.modules() if PACKED in m.__dict__}
    unprepare(model)
    grids = _declared_grids(policy, declared)
    named = dict(model.named_modules(remove_duplicate=False))
    owners = _owners(model, {named[n] for n in attention_names(named)}) if grids else []
    for module in model.modules():
        if module in owners or _takes_ids(module):
            packed = _shared_grid(module, earlier) or PackedGrid()
            packed.declare(grids)
            for inner in module.modules():
                inner.__dict__[PACKED] = packed
    for module, found in _annotations(named, policy, declared).items():
        if len({annotation.key for annotation in found}) > 1:
            log.warning(
                "%s are one module, but the policy has different rules for them: it stays dense. "
                "Give them one rule.",
                " and ".join(annotation.name for annotation in found),
            )
            continue
        module.__dict__[_ANNOTATION] = found[0]
        module.__dict__[KEY] = found[0].key
        module.register_forward_pre_hook(_read_key)
    for module in model.modules():
        if module in owners or _takes_ids(module):
            _watch(module)
    _warn_of_recompile_limit(model)
    return model


def _declared_grids(policy: Policy, declared: DeclaredLayout | None) -> tuple[Segments, ...]:
    """The different grids that are declared for some layer, or several for one."""
    layouts = [declared] if declared else [policy.layout, *(rule.layout for rule in policy.rules)]
    return tuple(dict.fromkeys(layout.segments for layout in layouts if layout is not None))


def _takes_ids(module: nn.Module) -> bool:
    return IDS in inspect.signature(module.forward).parameters


def _owners(model: nn.Module, attention: Collection[nn.Module]) -> list[nn.Module]:
    """The modules whose inputs may show the grid of the attention in them: the model, and if its
    blocks are further inside (a wrapper, a pipeline of two transformers), what lies around them.
    """

    def has_attention(module: nn.Module) -> bool:
        return any(inner in attention for inner in module.modules())

    def has_blocks(module: nn.Module) -> bool:
        return any(isinstance(m, LISTS) and has_attention(m) for m in module.modules())

    children = list(model.children())
    if any(isinstance(child, LISTS) and has_attention(child) for child in children):
        return [model]
    inner = (_owners(child, attention) for child in children if has_blocks(child))
    return [model, *(module for modules in inner for module in modules)]


def _watch(module: nn.Module) -> None:
    """Hooks a module, unless no attention in it depends on what its inputs show."""
    below = [
        m.__dict__[PACKED] for m in module.modules() if annotation_of(m) and PACKED in m.__dict__
    ]
    own = module.__dict__[PACKED]
    if below or _takes_ids(module):
        module.__dict__[WATCH] = Watch(list(dict.fromkeys([own, *below])), _takes_ids(module))
        module.register_forward_pre_hook(_look_at_inputs, with_kwargs=True)


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
    """Removes every annotation and hook that `prepare` put on `model`, in place, and returns it."""
    for module in model.modules():
        module.__dict__.pop(_ANNOTATION, None)
        module.__dict__.pop(KEY, None)
        module.__dict__.pop(PACKED, None)
        module.__dict__.pop(WATCH, None)
        for handle, hook in list(module._forward_pre_hooks.items()):
            if hook in (_read_key, _look_at_inputs):
                del module._forward_pre_hooks[handle]
                module._forward_pre_hooks_with_kwargs.pop(handle, None)
    return model


def annotation_of(module: nn.Module | None) -> Annotation | None:
    """The annotation on `module`, if it has one."""
    return None if module is None else module.__dict__.get(_ANNOTATION)


def annotations_below(roots: Iterable[nn.Module]) -> dict[int, Annotation]:
    """All annotations below these modules, by `id` of the module that carries them."""
    modules = (module for root in roots for module in root.modules())
    return {id(m): annotation for m in modules if (annotation := annotation_of(m)) is not None}


def _read_key(module: nn.Module, args: Any) -> None:
    # The comparison is what makes Dynamo guard on the value.
    if module.__dict__[KEY] == "":
        raise AssertionError("an annotated module has a key")
    packed = module.__dict__.get(PACKED)
    if packed is not None and torch.compiler.is_dynamo_compiling():
        mark(packed)


@torch.compiler.disable
def _look_at_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keeps the grids that the inputs of a call show."""
    module.__dict__[WATCH].look(module, args, kwargs)


@torch.compiler.substitute_in_graph(_look_at_inputs, skip_signature_check=True)
def _look_when_inlined(module: Any, args: Any, kwargs: Any) -> None:
    """Inside a larger graph nothing can be read; only what the graph itself shows counts there."""
    return


def show_grids(model: nn.Module, segments: Segments | None) -> bool:
    """Makes guards see that position ids show these; whether `model` is prepared for any."""
    known = {packed for module in model.modules() if (packed := module.__dict__.get(PACKED))}
    for packed in known:
        # A graph that was made while these were shown, but for other ids, must go, too.
        packed.show(None if packed.of_ids == segments else segments)
    return bool(known)


def attention_names(named: Mapping[str, nn.Module]) -> set[str]:
    """The names of the modules that look like attention; of all that may hold some if none does."""
    found = {name for name, module in named.items() if _is_attention(module)}
    return found or _names_to_annotate(named)


def _names_to_annotate(named: Mapping[str, nn.Module]) -> set[str]:
    """The names of the modules that may hold an attention site."""
    chosen = {name for name, module in named.items() if _is_attention(module)}
    for parent, module in named.items():
        if isinstance(module, nn.ModuleList):
            for index in range(len(module)):
                name = f"{parent}.{index}" if parent else str(index)
                if not any(other == name or other.startswith(f"{name}.") for other in chosen):
                    chosen.add(name)
    return chosen


def _annotations(
    named: Mapping[str, nn.Module], policy: Policy, declared: DeclaredLayout | None
) -> dict[nn.Module, list[Annotation]]:
    """The annotations of every module that may hold an attention site, one for each of its names."""
    chosen = _names_to_annotate(named)
    annotations: dict[nn.Module, list[Annotation]] = defaultdict(list)
    for name, module in named.items():
        if name in chosen:
            packed = module.__dict__.get(PACKED)
            annotations[module].append(
                Annotation(policy, name, class_stack(named, name), declared, packed)
            )
    return annotations


def model_around(root: nn.Module | None) -> nn.Module | None:
    """The model that the code being compiled is a part of: of the module itself and those whose
    calls are under way, the first that has the blocks; the module itself if none has.
    """
    around = [root] if root is not None else []
    frame = sys._getframe()
    while frame is not None:
        # Looking at a frame's variables keeps them alive until it returns: only where it matters.
        owner = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if isinstance(owner, nn.Module) and not type(owner).__module__.startswith("torch._dynamo"):
            around.append(owner)
        frame = frame.f_back  # type: ignore[assignment]
    return next((module for module in around if _has_blocks(module)), root)


def _has_blocks(module: nn.Module) -> bool:
    named = dict(module.named_modules())
    lists = [name for name, inner in named.items() if isinstance(inner, LISTS)]
    names = attention_names(named)
    return any(name.startswith(f"{outer}.") or not outer for outer in lists for name in names)


def class_stack(named: Mapping[str, nn.Module], name: str) -> tuple[str, ...]:
    """Class names of the modules from the root down to `name`."""
    parts = name.split(".") if name else []
    paths = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
    return tuple(type(named[path]).__name__ for path in paths if path in named)


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, LISTS):
        return False
    if _LOOKS_LIKE_ATTENTION.search(type(module).__name__):
        return True
    return any(child in _PROJECTIONS for child, _ in module.named_children())


def _warn_of_recompile_limit(model: nn.Module) -> None:
    limit = _torch.recompile_limit()
    if limit is None:
        return
    graphs: dict[type, set[tuple[str, ...]]] = defaultdict(set)
    for blocks in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
        for block in blocks:
            keys = tuple(m.__dict__[KEY] for m in block.modules() if annotation_of(m) is not None)
            graphs[type(block)].add(keys)
    for block_class, combinations in graphs.items():
        if len(combinations) > limit:
            log.warning(
                "%s has %d different combinations of rules, more than "
                "torch._dynamo.config.recompile_limit = %d: compiled block by block, the rest "
                "would silently run eagerly. Raise the limit, or compile the whole model.",
                block_class.__name__,
                len(combinations),
                limit,
            )
