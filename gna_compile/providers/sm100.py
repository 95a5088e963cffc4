"""The provider that runs the Blackwell kernel of csrc/sm100; see its header gna_sm100.h."""

from __future__ import annotations

from gna_compile.providers.native_cuda import NativeCuda


class Sm100(NativeCuda):
    """The native kernel for compute capability 10.0 and 10.3: one binary for both."""

    def __init__(self) -> None:
        super().__init__("sm100", ((10, 0), (10, 3)))
