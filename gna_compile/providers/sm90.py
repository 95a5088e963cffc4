"""The provider that runs the Hopper kernel of csrc/sm90; see its header gna_sm90.h."""

from __future__ import annotations

from gna_compile.providers.native_cuda import NativeCuda


class Sm90(NativeCuda):
    """The native kernel for compute capability 9.0."""

    def __init__(self) -> None:
        super().__init__("sm90", ((9, 0),))
