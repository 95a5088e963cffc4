"""`python -m benchmarks NAME`."""

from __future__ import annotations

import typer

from benchmarks import overhead

app = typer.Typer(help=__doc__, no_args_is_help=True)
app.command("overhead")(overhead.main)


@app.callback()
def _several_commands() -> None:
    """Keeps the name of the benchmark necessary while there is only one."""


if __name__ == "__main__":
    app()
