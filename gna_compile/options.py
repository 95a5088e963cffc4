"""The keys of `torch.compile(..., backend="gna", options={...})`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from gna_compile.policy import Policy


class OptionsError(ValueError):
    """An option that the backend does not know, or of the wrong type."""


@dataclass(frozen=True)
class Options:
    """What `options` may hold.

    Attributes:
        policy: a shipped policy's name, a path, a dict, or a loaded `Policy`. May be absent for a
            model that `gna_compile.prepare` has annotated with one.
        inner: the backend that lowers the rewritten graph: "inductor", or for debugging
            "aot_eager", "eager" or any other that `torch._dynamo.list_backends` knows.
        mode: Inductor's mode ("reduce-overhead", "max-autotune", ...). It is a key here because
            `torch.compile` refuses `mode=` beside `options=`.
        inductor: Inductor's own options, as `options=` of `backend="inductor"` takes them.
        verify_masks: assert at run time that masks declared as `key_mask: global_tokens` hide
            nothing on the grid.
        verify: "layouts" checks at the first call of each graph, on its real inputs, that the tokens
            of every rewritten attention lie as it claims; a `LayoutError` says where they do not.
            Nothing is checked by default, nor after the first call.
    """

    policy: str | PathLike[str] | Mapping[str, Any] | Policy | None = None
    inner: str = "inductor"
    mode: str | None = None
    inductor: dict[str, Any] | None = None
    verify_masks: bool = False
    verify: Literal["layouts"] | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Checks what `torch.compile` hands over.

        Raises:
            OptionsError: names the key, what is wrong with it, and the nearest known key.
        """
        given = dict(options or {})
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                raise OptionsError(_unknown(key, known))
        if mode is not None:
            given["mode"] = mode
        if not isinstance(given.get("inner", ""), str):
            raise OptionsError(f"option 'inner' must be a backend's name, not {given['inner']!r}")
        if not isinstance(given.get("mode"), (str, type(None))):
            raise OptionsError(f"option 'mode' must be a string, not {given['mode']!r}")
        if not isinstance(given.get("inductor"), (dict, type(None))):
            raise OptionsError(
                f"option 'inductor' must be a dict of Inductor's options, not {given['inductor']!r}"
            )
        if not isinstance(given.get("verify_masks", False), bool):
            raise OptionsError(
                f"option 'verify_masks' must be true or false, not {given['verify_masks']!r}"
            )
        if given.get("verify") not in (None, "layouts"):
            raise OptionsError(f"option 'verify' must be 'layouts', not {given['verify']!r}")
        settings = cls(**given)
        if settings.inner != "inductor" and (settings.mode or settings.inductor):
            raise OptionsError(
                f"options 'mode' and 'inductor' are Inductor's; inner is {settings.inner!r}"
            )
        return settings


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    if near:
        return f"unknown option {key!r}; did you mean {near[0]!r}?"
    from gna_compile import _torch

    if str(key).replace("-", "_") in _torch.inductor_options():
        return (
            f"unknown option {key!r}; Inductor's options go under 'inductor': "
            f"options={{'policy': ..., 'inductor': {{{key!r}: ...}}}}"
        )
    return f"unknown option {key!r}; known options are {', '.join(known)}"
