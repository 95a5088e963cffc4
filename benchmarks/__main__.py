"""`python -m benchmarks NAME`."""

from __future__ import annotations

import typer

from benchmarks import cpu, denoising, models, overhead

app = typer.Typer(help=__doc__, no_args_is_help=True)
app.command("cpu")(cpu.main)
app.command("denoising")(denoising.main)
app.command("models")(models.main)
app.command("overhead")(overhead.main)


if __name__ == "__main__":
    app()
