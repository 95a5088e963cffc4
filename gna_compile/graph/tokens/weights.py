"""Which inputs of a graph are weights of layers, though they are no parameters of a module.

`torch.func.functional_call` and stacked models hand weights over as plain tensors. One that only
ever stands where a layer has its weight or bias carries no tokens, whatever its name is.
"""

from __future__ import annotations

from torch import fx

from gna_compile import _torch
from gna_compile.graph.functorch import ADD_BATCH_DIM, SAME
from gna_compile.graph.nodes import argument_of, operator_name, tensor_of

_PLACES: dict[str, dict[int, str]] = {
    **{name: {1: "weight", 2: "bias"} for name in ("linear", "conv1d", "conv2d", "conv3d")},
    **{name: {2: "weight", 3: "bias"} for name in ("layer_norm", "group_norm")},
    "rms_norm": {2: "weight"},
    "batch_norm": {1: "running_mean", 2: "running_var", 3: "weight", 4: "bias"},
}
_GRADIENTS = _torch.called("autograd_grad")
_HANDED_ON = SAME | {ADD_BATCH_DIM}


def is_weight(node: fx.Node) -> bool:
    """Whether a tensor is used as a weight or bias of layers, and as nothing else."""
    return bool(node.users) and all(_is_weight_in(user, node) for user in node.users)


def _is_weight_in(user: fx.Node, node: fx.Node) -> bool:
    name = operator_name(user)
    if user.op == "output" or name == _GRADIENTS:
        return True
    if name in _HANDED_ON:
        handed = user.args[:1] == (node,) and node not in user.args[1:]
        return handed and (not user.users or is_weight(user))
    places = _PLACES.get(name, {})
    found = [place for place, part in places.items() if argument_of(user, place, part) is node]
    count = sum(item is node for item in (*user.args, *user.kwargs.values()))
    if not found or len(found) != count:
        return False
    tensor = tensor_of(node)
    return tensor is not None and (places[found[0]] != "bias" or tensor.dim() == 1)
