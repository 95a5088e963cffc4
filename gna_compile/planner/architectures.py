"""The GPU generations that have a kernel of their own: the one place that lists them.

A provider, its first-use check, `gna doctor`, `gna simulate --arch` and the planner read the entry.
"""

from __future__ import annotations

from gna_compile.planner.costs import Architecture

SM90 = Architecture(
    name="sm90",
    capabilities=((9, 0),),
    tested_on=frozenset({"NVIDIA H100 80GB HBM3", "NVIDIA H200"}),
    # Fitted to the kernel's times on an H200.
    units=132,
    clock=1.816,
    flops=4096,
    exponentials=14.8,
    start=4800,
    mask_elements=17.0,
    bytes=45.0,
    tiles=((128, 128),),
    product_coordinates=32,
    product_elements=49.0,
)
SM100 = Architecture(
    name="sm100",
    capabilities=((10, 0), (10, 3)),
    # Published times of a B200.
    units=148,
    clock=1.99,
    flops=8192,
    exponentials=16,
    start=0,
    mask_elements=128 / 1.8,  # a mask takes 1.8 instructions an element; 4 x 32 are issued a clock
    bytes=45.0,
    tiles=((256, 128),),
    query_parts=2,
)

ARCHITECTURES = {entry.name: entry for entry in (SM90, SM100)}
"""By name, oldest first."""
