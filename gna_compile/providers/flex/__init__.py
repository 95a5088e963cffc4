"""FlexAttention: runs any attention pattern on GPUs that Triton knows.

| file | idea |
|---|---|
| `provider.py` | what it takes, and the kernels and tables that are kept |
| `steps.py` | what is compiled: copies into tile order, FlexAttention, copies back |
| `tiles.py` | a pattern laid out: rows of queries and keys, lists of tiles, the mask's tables |
| `columns.py` | the mask: what limits the keys that a row sees |
| `lists.py` | which tiles see each other |
| `parts.py` | the tokens of a sequence in tile order |
| `boxes.py` | into which boxes grids are cut |
| `cuts.py` | one axis cut into runs, and which runs a window links |
| `sights.py` | what segments see of each other |
"""
