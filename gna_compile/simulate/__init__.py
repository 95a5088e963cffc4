"""The simulator: the planner with a command in front."""

from gna_compile.simulate.command import simulate

__all__ = ["simulate"]
