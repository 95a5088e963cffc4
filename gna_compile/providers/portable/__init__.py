"""PyTorch's own operators: runs everywhere, and any attention pattern.

| file | idea |
|---|---|
| `pieces.py` | a pattern as pieces: queries with the same links |
| `tiles.py` | how one axis of a piece is cut |
| `cuts.py` | the cheapest cut of a piece, and what it costs |
| `places.py` | where tokens lie in a sequence |
| `tile_tensors.py` | one tile: its rows and keys, read and written |
| `masks.py` | what is hidden within a tile |
| `walk.py` | parts of the batch and heads, and the tiles of each |
| `exact.py` | attention within a tile that keeps hidden values out |
| `provider.py` | forward and backward |
| `tangents.py` | the forward-mode derivative |
"""
