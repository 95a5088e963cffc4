"""The planner: how a problem is cut into tiles, exactly what that visits, and what it will cost.

    workload = Workload(Neighborhood.of((30, 48, 80), (18, 24, 24), (16, 8, 8)), heads=24)
    cut = plan(workload, "sm90")      # query_box, key_box, counts, milliseconds; cached
    speedups(cut).predicted           # over dense attention

Plain Python on ints; importing this needs no torch.
"""

from gna_compile.planner.architectures import ARCHITECTURES
from gna_compile.planner.costs import Architecture
from gna_compile.planner.counts import Box, Counts, Tally, Tiling
from gna_compile.planner.hints import better_stride
from gna_compile.planner.search import Plan, PlanError, Workload, plan, plan_with
from gna_compile.planner.speedup import Speedups, dense_plan, end_to_end, speedups

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Box",
    "Counts",
    "Plan",
    "PlanError",
    "Speedups",
    "Tally",
    "Tiling",
    "Workload",
    "better_stride",
    "dense_plan",
    "end_to_end",
    "plan",
    "plan_with",
    "speedups",
]
