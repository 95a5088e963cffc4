"""`explain` and `graph_diff`: what the backend would do to a model, without lowering it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gna_compile import _torch
from gna_compile.backend import compile_graph
from gna_compile.options import Options
from gna_compile.policy import Policy, load_policy
from gna_compile.report.collect import GraphRecord, collecting, summary
from gna_compile.report.graph_text import unified_diff
from gna_compile.report.rows import Row
from gna_compile.report.table import reasons_in_words, table_of

PolicyLike = str | PathLike[str] | Mapping[str, Any] | Policy | None


@dataclass(frozen=True)
class Explanation:
    """The decisions on all sites of a model, in the order in which its graphs were compiled."""

    records: tuple[GraphRecord, ...]

    @property
    def rows(self) -> list[Row]:
        return [row for record in self.records for row in record.rows]

    def to_json(self) -> str:
        """All rows as a JSON array."""
        return json.dumps([row.as_dict() for row in self.rows], indent=2)

    def table(self) -> Table:
        """A rich table, one row a site and phase; phases with equal decisions share rows."""
        return table_of(self.rows)

    def print(self, console: Console | None = None) -> None:
        """Prints the table, a line of summary, and why sites stay dense."""
        console = console or Console(width=None if sys.stdout.isatty() else 100)
        console.print(self.table())
        console.print(summary(self.rows) if self.rows else "no attention sites found")
        for reason in reasons_in_words(self.rows):
            console.print(f"  {reason}", highlight=False, markup=False)


def explain(
    model: Callable[..., Any],
    *args: Any,
    policy: PolicyLike = None,
    quiet: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Runs `model` once, without gradients and without lowering, and says what becomes of each site.

    Args:
        model: a module or function; may be prepared, and may live on the meta device.
        *args, **kwargs: its inputs.
        policy: as the backend's option of that name; not needed for a prepared model.
        quiet: return only; otherwise also print the table.

    Raises:
        PolicyError: if the policy is malformed.
        RuntimeError: if Dynamo compiles nothing of the model.
    """
    result = Explanation(tuple(_records(model, args, kwargs, policy)))
    if not quiet:
        result.print()
    return result


def graph_diff(
    model: Callable[..., Any], *args: Any, policy: PolicyLike = None, **kwargs: Any
) -> str:
    """What the rewrite changes in the graphs of `model`, as unified diffs; "" if nothing.

    Arguments as for `explain`.
    """
    diffs = [
        unified_diff(record.before, after)
        for record in _records(model, args, kwargs, policy)
        for after in record.after
    ]
    return "\n\n".join(diff for diff in diffs if diff)


def _records(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], policy: PolicyLike
) -> list[GraphRecord]:
    policy = None if policy is None else load_policy(policy)
    options = Options(policy=policy, inner="eager")

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from gna_compile.graph.rewrite import copy_with_sites

        dense = copy_with_sites(gm, [])[0]
        compile_graph(gm, inputs, options, quiet=True)
        return dense.forward

    with collecting() as records, torch.no_grad(), _torch.without_recompile_limit():
        torch.compile(model, backend=backend)(*args, **kwargs)
    if not records:
        raise RuntimeError(
            "Dynamo compiled no graph of this model, so there is nothing to explain. Its code is "
            "disabled for compilation, or reached torch._dynamo.config.recompile_limit earlier in "
            "this process: call torch._dynamo.reset() first."
        )
    return records
