"""Lets timm be imported where torchvision is not installed.

timm imports torchvision for image transforms, data sets and one normalization class; its vision
transformers use none of them. `torchvision_stub` puts just enough of the package in place while
timm is imported and takes it away afterwards, since transformers and diffusers ask whether
torchvision is there and would believe it.
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

MODULES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _StubModule(types.ModuleType):
    """A module in which every public name is a class."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        value = InterpolationMode if name == "InterpolationMode" else type(name, (nn.Module,), {})
        setattr(self, name, value)
        return value


@contextmanager
def torchvision_stub() -> Iterator[None]:
    """Within the context `import torchvision` succeeds: the real one if installed, else a stub."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    stubs = {name: _StubModule(name) for name in MODULES}
    for name, stub in stubs.items():
        stub.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
        stub.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stubs[parent], child, stub)
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            sys.modules.pop(name, None)
