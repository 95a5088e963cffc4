"""How much faster than dense attention: four figures of one plan, and of a whole run.

- *FLOP bound*: pairs of dense attention over pairs that the mask needs.
- *mean-tile bound*: pairs of dense attention over pairs of all visited tiles.
- *simulator*: key tiles of dense attention over the largest number that one query tile of the grid
  visits, the figure of Generalized Neighborhood Attention (arXiv 2504.16922).
- *predicted*: the time of dense attention over the plan's, both by the cost table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from gna_compile.geometry import Axis, Neighborhood
from gna_compile.planner.counts import global_key_tiles
from gna_compile.planner.search import Plan, PlanError, Workload, plan


@dataclass(frozen=True)
class Speedups:
    """Speedups of one plan over dense attention of the same tokens; see the module's docstring.

    Attributes:
        dense_milliseconds: predicted time of dense attention.
    """

    flop_bound: float
    mean_tile: float
    simulator: float
    predicted: float
    dense_milliseconds: float


def speedups(cut: Plan) -> Speedups:
    """All figures of a plan."""
    neighborhood = cut.workload.neighborhood
    dense = dense_plan(cut.workload, cut.architecture)
    dense_tiles = global_key_tiles(neighborhood, cut.key_tile)[0] + math.prod(
        -(-axis.length // extent)
        for axis, extent in zip(neighborhood.axes, cut.key_box, strict=True)
    )
    return Speedups(
        flop_bound=neighborhood.tokens**2 / neighborhood.pairs,
        mean_tile=neighborhood.tokens**2 / (cut.visited * cut.query_tile * cut.key_tile),
        simulator=dense_tiles / cut.grid.visited.max,
        predicted=dense.milliseconds / cut.milliseconds,
        dense_milliseconds=dense.milliseconds,
    )


@lru_cache(maxsize=1024)
def dense_plan(workload: Workload, architecture: str = "sm90") -> Plan:
    """The plan of dense attention over the same tokens, which has one axis and no key mask."""
    tokens = workload.neighborhood.tokens
    row = Neighborhood((Axis(tokens, tokens),))
    dense = Workload(row, workload.heads, workload.head_dim, workload.element_bytes)
    return plan(dense, architecture)


def end_to_end(
    speedup: float, attention_share: float, dense_steps: int = 0, steps: int = 1
) -> float:
    """Speedup of a whole run, by Amdahl's law.

    Args:
        speedup: of the attention that is rewritten.
        attention_share: share of the run's time that this attention takes when dense, 0 to 1.
        dense_steps: how many of `steps` keep it dense.
        steps: steps of a run.

    Raises:
        PlanError: if an argument is out of range.
    """
    if not speedup > 0:
        raise PlanError(f"speedup {speedup} must be above 0")
    if not 0 <= attention_share <= 1:
        raise PlanError(f"attention_share {attention_share} must lie between 0 and 1")
    if steps < 1 or not 0 <= dense_steps <= steps:
        raise PlanError(f"dense_steps {dense_steps} must lie between 0 and steps {steps}")
    dense = dense_steps / steps
    return 1 / (1 - attention_share + attention_share * (dense + (1 - dense) / speedup))
