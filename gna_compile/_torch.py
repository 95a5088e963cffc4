"""Every private name of torch that this package uses, and what is off on a torch without it.

Private names may go with any release. Each is listed in `NAMES` with what it is for and the
versions it was read at, and belongs to a feature. `_torch.install_guard` is the name itself, looked
up when it is first used, or `Missing`; `why_not("prepare")` says whether all names of a feature are
there. Where one is missing, the feature declines with that reason and everything else goes on.

Nothing else in the package names private parts of torch, but for what Dynamo keeps in a node's
`meta`, and the prefixes of names in the code that it generates.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.autograd import forward_ad

log = logging.getLogger("gna_compile")

TESTED = "2.15"
"""The newest torch that the tests were run on; pyproject.toml names the oldest."""

FEATURES = {
    "rewriting": "every graph stays dense",
    "op": "every graph stays dense, and neighborhood_attention raises",
    "symbolic sizes": "graphs with symbolic sizes stay dense",
    "torch.func": "attention under torch.func's vmap, grad and jvp stays dense",
    "prepare": "what gna_compile.prepare says of a model is not read",
    "memory": "any two tensors are taken to share memory",
    "verify_masks": "attention with a mask stays dense under the option verify_masks",
    "CPU flash attention": "the provider portable takes its slower way on CPUs",
    "flex": "the provider flex is not usable",
    "streams": "every launch asks for its stream by a slower way",
    "Inductor's options": "the options mode and inductor are not taken",
    "inner": "the option inner runs the graph as it is",
    "random numbers": "a slower way keeps the caller's random numbers",
    "recompile limit": "nothing is said when Dynamo reaches its limit",
    "nested graph breaks": "they are taken to be off",
    "option names": "a misplaced option of Inductor's is not recognized as one",
}
"""What is off without a name of the feature."""


class Missing(RuntimeError):
    """A private name that this torch does not have, in words."""


class Name(NamedTuple):
    """A private name.

    Attributes:
        feature: what needs it, a key of `FEATURES`.
        where: module and path in it, `module:path`.
        use: what for.
        read: the oldest and the newest torch whose code was read for it, or ran.
        is_there: tells whether it is there, if only an instance has it.
    """

    feature: str
    where: str
    use: str
    read: str
    is_there: Callable[[], bool] | None = None


def _says(module: str, text: str) -> Callable[[], bool]:
    """Whether the source of a module of torch has a text; it counts as there if no source is."""

    def check() -> bool:
        file = getattr(import_module(module), "__file__", None)
        if file is None or not file.endswith(".py") or not Path(file).is_file():
            return True
        return text in Path(file).read_text(encoding="utf-8")

    return check


def _symbols(name: str) -> str:
    return f"torch.fx.experimental.symbolic_shapes:{name}"


def _has_guards() -> bool:
    return hasattr(import_module("torch.fx.experimental.symbolic_shapes").ShapeEnv(), "guards")


def _has_fake_mode() -> bool:
    fake = import_module("torch._subclasses.fake_tensor").FakeTensor
    return "fake_mode" in fake.__annotations__ or hasattr(fake, "fake_mode")


def _has_shape_env() -> bool:
    node = import_module("torch.fx.experimental.sym_node").SymNode
    return hasattr(node, "shape_env") or "shape_env" in node.__init__.__code__.co_names


def _has_raw_stream() -> bool:
    return torch.version.cuda is None or hasattr(torch._C, "_cuda_getCurrentRawStream")


_TRACED = "torch._dynamo.symbolic_convert"
_OUTPUT = "torch._dynamo.output_graph"
_FUNCTORCH = "torch._C._functorch"
_ALL = "2.11 to 2.15"

# One line a name: feature, where, what for, versions read at.
# fmt: off
NAMES: dict[str, Name] = {
    # Graphs
    "OpOverload": Name("rewriting", "torch._ops:OpOverload", "tells aten operators in a graph", _ALL),
    "OpOverloadPacket": Name("rewriting", "torch._ops:OpOverloadPacket", "tells aten operators in a graph", _ALL),
    "HigherOrderOperator": Name("rewriting", "torch._ops:HigherOrderOperator", "tells operators that have subgraphs", _ALL),
    "qualified_name": Name("rewriting", "torch:ops.aten.add._qualified_op_name", "an operator's name", _ALL),
    "schema": Name("rewriting", "torch:ops.aten.add.Tensor._schema", "which arguments an operator writes to", _ALL),
    "FakeTensor": Name("rewriting", "torch._subclasses.fake_tensor:FakeTensor", "tells plain tensors from subclasses", _ALL),
    "fake_mode": Name("rewriting", "torch._subclasses.fake_tensor:FakeTensor.fake_mode", "shapes of new nodes", _ALL, _has_fake_mode),
    "is_erased": Name("rewriting", "torch.fx:Node._erased", "what of a replaced site is gone already", _ALL),
    "source_name": Name("rewriting", f"{_OUTPUT}:Node._dynamo_source", "which inputs are a module's, for us and for AOTAutograd", _ALL, _says(_OUTPUT, "_dynamo_source")),
    "copy_sources": Name("rewriting", f"{_OUTPUT}:GraphModule._param_name_to_source", "which inputs are parameters, for AOTAutograd", _ALL, _says(_OUTPUT, "_param_name_to_source")),
    "storage_key": Name("memory", "torch:UntypedStorage._cdata", "tells which tensors share memory", _ALL),
    # The op
    "SingleLevelFunction": Name("op", "torch.autograd.function:_SingleLevelFunction", "its derivatives, under functorch too", _ALL),
    "enable_single_level_autograd_function": Name("op", "torch._functorch.utils:enable_single_level_autograd_function", "its derivatives under functorch", _ALL),
    "are_functorch_transforms_active": Name("op", "torch._C:_are_functorch_transforms_active", "whether functorch is at work", _ALL),
    "set_forward_gradient_enabled": Name("op", "torch.autograd.forward_ad:_set_fwd_grad_enabled", "keeps the transforms around an autograd function", _ALL),
    "forward_gradient_level": Name("op", "torch.autograd.forward_ad:_current_level", "whether operands may have tangents", _ALL),
    "AutoDispatchBelowAutograd": Name("op", "torch._C:_AutoDispatchBelowAutograd", "providers run below autograd", _ALL),
    "ExcludeDispatchKeyGuard": Name("op", "torch._C:_ExcludeDispatchKeyGuard", "providers run without autocast", _ALL),
    "DispatchKeySet": Name("op", "torch._C:DispatchKeySet", "autocast's dispatch keys", _ALL),
    "DispatchKey": Name("op", "torch._C:DispatchKey", "autocast's dispatch keys", _ALL),
    "after_autograd_keyset": Name("op", "torch._C:_after_autograd_keyset", "the dispatch keys below autograd", _ALL),
    "redispatch": Name("op", "torch:ops.aten.add.Tensor.redispatch", "calls what lies below autograd", _ALL),
    # Symbolic sizes
    "expression": Name("symbolic sizes", "torch.fx.experimental.sym_node:SymNode.expr", "a size as an expression of symbols", _ALL),
    "hint": Name("symbolic sizes", "torch.fx.experimental.sym_node:SymNode.hint", "its value in the example inputs", _ALL),
    "guards": Name("symbolic sizes", _symbols("ShapeEnv.guards"), "which symbols guards hold equal", _ALL, _has_guards),
    "shape_env": Name("symbolic sizes", "torch.fx.experimental.sym_node:SymNode.shape_env", "where those guards are", _ALL, _has_shape_env),
    "free_unbacked_symbols": Name("symbolic sizes", _symbols("free_unbacked_symbols"), "which sizes depend on data", _ALL),
    "statically_known_true": Name("symbolic sizes", _symbols("statically_known_true"), "what holds for all sizes, without a guard", _ALL),
    "SymT": Name("symbolic sizes", "torch.utils._sympy.symbol:SymT", "which symbols stand for floats", _ALL),
    "symbol_is_type": Name("symbolic sizes", "torch.utils._sympy.symbol:symbol_is_type", "which symbols stand for floats", _ALL),
    "sympy_interp": Name("symbolic sizes", "torch.utils._sympy.interp:sympy_interp", "nodes that compute a size", _ALL),
    "ReferenceAnalysis": Name("symbolic sizes", "torch.utils._sympy.reference:OptimizedPythonReferenceAnalysis", "nodes that compute a size", _ALL),
    # Graphs with torch.func: calls that Dynamo writes, known by their names, and what tensors wrap
    "enter_vmap": Name("torch.func", f"{_FUNCTORCH}:_vmap_increment_nesting", "where vmap begins", _ALL),
    "leave_vmap": Name("torch.func", f"{_FUNCTORCH}:_vmap_decrement_nesting", "where it ends", _ALL),
    "enter_grad": Name("torch.func", f"{_FUNCTORCH}:_grad_increment_nesting", "where grad or vjp begins", _ALL),
    "leave_grad": Name("torch.func", f"{_FUNCTORCH}:_grad_decrement_nesting", "where it ends", _ALL),
    "enter_jvp": Name("torch.func", f"{_FUNCTORCH}:_jvp_increment_nesting", "where jvp begins", _ALL),
    "leave_jvp": Name("torch.func", f"{_FUNCTORCH}:_jvp_decrement_nesting", "where it ends", _ALL),
    "add_batch_dim": Name("torch.func", f"{_FUNCTORCH}:_add_batch_dim", "a dimension that vmap hides", _ALL),
    "remove_batch_dim": Name("torch.func", f"{_FUNCTORCH}:_remove_batch_dim", "and shows again", _ALL),
    "wrap_for_grad": Name("torch.func", f"{_FUNCTORCH}:_wrap_for_grad", "a tensor inside grad", _ALL),
    "unwrap_for_grad": Name("torch.func", f"{_FUNCTORCH}:_unwrap_for_grad", "and outside of it", _ALL),
    "set_tensor_requires_grad": Name("torch.func", "torch._functorch.eager_transforms:_set_tensor_requires_grad", "what grad differentiates by", _ALL),
    "autograd_grad": Name("torch.func", "torch._functorch.eager_transforms:_autograd_grad", "the gradients", _ALL),
    "make_dual": Name("torch.func", "torch:_make_dual", "a tensor with its tangent", _ALL),
    "unpack_dual": Name("torch.func", "torch:_unpack_dual", "and both of them again", _ALL),
    "is_wrapped": Name("torch.func", f"{_FUNCTORCH}:is_functorch_wrapped_tensor", "tells tensors inside a transform", _ALL),
    "unwrapped": Name("torch.func", f"{_FUNCTORCH}:get_unwrapped", "the tensor that one wraps", _ALL),
    "is_batched": Name("torch.func", f"{_FUNCTORCH}:is_batchedtensor", "whether vmap wraps it", _ALL),
    "batch_level": Name("torch.func", f"{_FUNCTORCH}:maybe_get_level", "which vmap", _ALL),
    "batch_dim": Name("torch.func", f"{_FUNCTORCH}:maybe_get_bdim", "the dimension that it hides", _ALL),
    # The frame that Dynamo traces
    "InstructionTranslator": Name("prepare", f"{_TRACED}:InstructionTranslator", "the frame being compiled", _ALL),
    "current_tx": Name("prepare", f"{_TRACED}:InstructionTranslator.current_tx", "the frame being compiled", _ALL),
    "frame": Name("prepare", f"{_TRACED}:InstructionTranslator.f_locals", "its code and variables", _ALL, _says(_TRACED, "self.f_locals")),
    "install_guard": Name("prepare", "torch._dynamo.guards:install_guard", "guards on an annotation", _ALL),
    "GuardBuilder": Name("prepare", "torch._dynamo.guards:GuardBuilder", "guards on an annotation", _ALL),
    "EQUALS_MATCH": Name("prepare", "torch._dynamo.guards:GuardBuilder.EQUALS_MATCH", "guards on an annotation", _ALL),
    "AttrSource": Name("prepare", "torch._dynamo.source:AttrSource", "guards on an annotation", _ALL),
    "LocalSource": Name("prepare", "torch._dynamo.source:LocalSource", "guards on an annotation", _ALL),
    "CompileContext": Name("recompile limit", "torch._guards:CompileContext", "how often a frame was compiled", _ALL),
    "recompile_limit": Name("recompile limit", "torch._dynamo.config:recompile_limit", "how often Dynamo compiles a frame", _ALL),
    "nested_graph_breaks": Name("nested graph breaks", "torch._dynamo.config:nested_graph_breaks", "whether a hook that looks at inputs may be inlined", _ALL),
    # Lowering
    "InductorWrapper": Name("Inductor's options", "torch:_TorchCompileInductorWrapper", "what backend='inductor' runs", _ALL),
    "lookup_backend": Name("inner", "torch._dynamo.backends.registry:lookup_backend", "another backend by its name", _ALL),
    "preserve_rng_state": Name("random numbers", "torch._dynamo.utils:preserve_rng_state", "lowering and verifying draw none of the caller's", _ALL),
    "inductor_options": Name("option names", "torch._inductor.config:get_config_copy", "the names of Inductor's options", _ALL),
    "assert_async": Name("verify_masks", "torch:ops.aten._assert_async.msg", "an assertion in a graph", _ALL),
    # Providers
    "cpu_flash_attention": Name("CPU flash attention", "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu", "attention with its logsumexp", _ALL),
    "cpu_flash_attention_backward": Name("CPU flash attention", "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", "and its derivative", _ALL),
    "compile_lock": Name("flex", "torch._dynamo.convert_frame:compile_lock", "one thread traces at a time", _ALL),
    "compile_fx": Name("flex", "torch._inductor.compile_fx:compile_fx", "compiles the provider's graph", _ALL),
    "FakeTensorMode": Name("flex", "torch._subclasses.fake_tensor:FakeTensorMode", "traces the provider's graph", _ALL),
    "make_fx": Name("flex", "torch.fx.experimental.proxy_tensor:make_fx", "traces the provider's graph", _ALL),
    "flex_attention": Name("flex", "torch._higher_order_ops.flex_attention:flex_attention", "FlexAttention as an operator", _ALL),
    "flex_attention_backward": Name("flex", "torch._higher_order_ops.flex_attention:flex_attention_backward", "and its derivative", _ALL),
    "raw_stream": Name("streams", "torch._C:_cuda_getCurrentRawStream", "the CUDA stream to launch on", _ALL, _has_raw_stream),
}
# fmt: on

_found: dict[str, Any] = {}
_why: dict[str, str | None] = {}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = _found[name] = _look_up(name)
    return value


def _look_up(name: str) -> Any:
    entry = NAMES[name]
    module, _, path = entry.where.partition(":")
    try:
        if entry.is_there is not None:
            if not entry.is_there():
                raise AttributeError(path)
            return None
        value: Any = import_module(module)
        for part in path.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise _missing(name) from error
    return value


def _missing(name: str) -> Missing:
    entry = NAMES[name]
    where = entry.where.replace(":", ".")
    return Missing(f"torch {torch.__version__} has no {where} ({entry.use})")


def why_not(feature: str) -> str | None:
    """Why this torch does not have what a feature needs, or None if it has."""
    if feature not in _why:
        _why[feature] = None
        for name, entry in NAMES.items():
            try:
                if entry.feature == feature:
                    _look_up(name)
            except Missing as missing:
                _why[feature] = str(missing)
                break
    return _why[feature]


def require(feature: str) -> None:
    """Raises `Missing` if this torch does not have what a feature needs."""
    why = why_not(feature)
    if why is not None:
        raise Missing(why)


def probe() -> None:
    """Warns of every feature that is off, as far as modules tell that are loaded already."""
    for feature, effect in FEATURES.items():
        modules = (e.where.partition(":")[0] for e in NAMES.values() if e.feature == feature)
        if all(module in sys.modules for module in modules):
            why = why_not(feature)
            if why is not None:
                log.warning("%s: %s", why, effect)


def probes() -> dict[str, str]:
    """For each feature, in words: the names that are all there, or which is not, and the effect."""
    found: dict[str, str] = {}
    for feature, effect in FEATURES.items():
        names = ", ".join(name for name, entry in NAMES.items() if entry.feature == feature)
        why = why_not(feature)
        found[feature] = f"ok ({names})" if why is None else f"off, {effect}: {why}"
    return found


def forget() -> None:
    """Looks everything up anew from now on."""
    for name in _found:
        globals().pop(name, None)
    _found.clear()
    _why.clear()


def _oldest() -> str:
    """The oldest torch that this package takes, as its requirements say."""
    required = "\n".join(metadata.requires("gna-compile") or [])
    found = re.search(r"^torch\b.*>=\s*([\d.]+)", required, re.MULTILINE)
    return found[1] if found is not None else ""


def untested() -> str:
    """For which versions of torch this was tested, in words, if not for this one; else ""."""
    version, oldest, newest = map(_numbers, (torch.__version__, _oldest(), TESTED))
    return "" if oldest <= version <= newest else f"tested: {_oldest()} to {TESTED}"


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


# Attributes that only instances have -------------------------------------------------------------


def expression(size: Any) -> Any:
    """A symbolic size as a sympy expression."""
    try:
        return size.node.expr
    except AttributeError as error:
        raise _missing("expression") from error


def hint(size: Any) -> Any:
    """A symbolic size's value in the example inputs; None if it depends on data."""
    try:
        return size.node.hint
    except AttributeError as error:
        raise _missing("hint") from error


def guards(size: Any) -> Sequence[Any]:
    """The guards on symbols, as far as there are any."""
    environment = getattr(size.node, "shape_env", None)
    return getattr(environment, "guards", ())


def qualified_name(packet: Any) -> str:
    """E.g. `aten::add`."""
    return str(_attribute(packet, "_qualified_op_name", "qualified_name"))


def forward_gradient_level() -> int:
    """The level of forward-mode differentiation; -1 where there is none."""
    try:
        return int(forward_ad._current_level)
    except AttributeError as error:
        raise _missing("forward_gradient_level") from error


def arguments(overload: Any) -> Sequence[Any]:
    """What an operator's schema says of its arguments."""
    found: Sequence[Any] = _attribute(overload, "_schema", "schema").arguments
    return found


def fake_mode(tensor: Any) -> Any:
    """The mode that made a fake tensor."""
    return _attribute(tensor, "fake_mode", "fake_mode")


def marked_dynamic(tensor: torch.Tensor) -> Sequence[int]:
    """The dimensions that `torch._dynamo.mark_dynamic` was called for."""
    return tuple(getattr(tensor, "_dynamo_dynamic_indices", ()))


def is_erased(node: fx.Node) -> bool:
    """Whether a node was taken out of its graph."""
    return bool(_attribute(node, "_erased", "is_erased"))


def source_name(node: fx.Node) -> str:
    """Where an input of Dynamo's graph comes from, e.g. `L['self'].weight`; "" if it is not noted."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)


def copy_sources(old: Any, new: Any) -> None:
    """Copies where the inputs come from, noted on a graph module or on a node of its graph."""
    for name in ("_param_name_to_source", "_dynamo_source"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


def storage_key(tensor: torch.Tensor) -> Any:
    """Equal for tensors that share memory.

    Raises:
        NotImplementedError, RuntimeError: if that cannot be told.
    """
    require("memory")
    if not why_not("torch.func"):
        tensor = innermost(tensor)
    return tensor.untyped_storage()._cdata


def called(name: str) -> str:
    """What the function of an entry is called in Dynamo's graphs, whichever module wraps it."""
    return re.split(r"[.:]", NAMES[name].where)[-1]


def innermost(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that lies inside the wrappers of `torch.func`, if it has any."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _attribute(owner: Any, attribute: str, name: str) -> Any:
    try:
        return getattr(owner, attribute)
    except AttributeError as error:
        raise _missing(name) from error


# Names with another way to the same --------------------------------------------------------------


def recompile_limit() -> int | None:
    """How often Dynamo compiles a frame before it runs it eagerly; None if that is not known."""
    return None if why_not("recompile limit") else torch._dynamo.config.recompile_limit


def without_recompile_limit() -> AbstractContextManager[Any]:
    """Lets Dynamo compile a frame as often as it takes."""
    if why_not("recompile limit"):
        return nullcontext()
    patch: AbstractContextManager[Any] = torch._dynamo.config.patch(recompile_limit=2**20)
    return patch


def nested_graph_breaks() -> bool:
    """Whether Dynamo goes on in the middle of a call after a graph break."""
    return not why_not("nested graph breaks") and bool(torch._dynamo.config.nested_graph_breaks)


def random_numbers_kept() -> AbstractContextManager[Any]:
    """Gives the caller's random numbers back at the end."""
    if why_not("random numbers"):
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        return torch.random.fork_rng(devices)
    kept: AbstractContextManager[Any] = torch._dynamo.utils.preserve_rng_state()
    return kept


def raw_stream(device: int) -> int:
    """The current CUDA stream of a device, as a number."""
    if why_not("streams"):
        return int(torch.cuda.current_stream(device).cuda_stream)
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def inductor_options() -> frozenset[str]:
    """The names of Inductor's options; none if they cannot be asked for."""
    if why_not("option names"):
        return frozenset()
    return frozenset(import_module("torch._inductor.config").get_config_copy())
