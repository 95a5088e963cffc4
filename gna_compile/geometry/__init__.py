"""Which keys a query sees, in plain ints: the one definition that everything else follows.

| file | idea |
|---|---|
| `axis.py` | one axis of a grid: window, stride, dilation, causality |
| `neighborhood.py` | one grid with global tokens around it, all heads alike |
| `segments.py` | what a sequence is made of: global tokens, grids, boxes of grids |
| `pattern.py` | any attention pattern: segments, links between them, groups of heads |
| `canonical.py` | one form for all patterns that are equal |
| `encoding.py` | a pattern as a list of ints, the op's argument |
| `text.py` | a pattern in words |
"""

from gna_compile.geometry.axis import Axis, GeometryError
from gna_compile.geometry.canonical import canonical, of_heads
from gna_compile.geometry.encoding import decode, encode, write_grid, write_layout
from gna_compile.geometry.neighborhood import Neighborhood
from gna_compile.geometry.pattern import (
    AttentionPattern,
    HeadGroup,
    Link,
    Window,
    default_links,
)
from gna_compile.geometry.segments import GlobalTokens, GridTokens, Segment
from gna_compile.geometry.text import text_of_list

__all__ = [
    "AttentionPattern",
    "Axis",
    "GeometryError",
    "GlobalTokens",
    "GridTokens",
    "HeadGroup",
    "Link",
    "Neighborhood",
    "Segment",
    "Window",
    "canonical",
    "decode",
    "default_links",
    "encode",
    "of_heads",
    "text_of_list",
    "write_grid",
    "write_layout",
]
