"""`python -m benchmarks NAME`."""

from __future__ import annotations

import typer

from benchmarks import (
    backward,
    cpu,
    denoising,
    kernels,
    models,
    overhead,
    patterns,
    plots,
    resolutions,
)

app = typer.Typer(help=__doc__, no_args_is_help=True)
app.command("backward")(backward.main)
app.command("cpu")(cpu.main)
app.command("denoising")(denoising.main)
app.command("kernels")(kernels.main)
app.command("models")(models.main)
app.command("overhead")(overhead.main)
app.command("patterns")(patterns.main)
app.command("plots")(plots.main)
app.command("resolutions")(resolutions.main)


if __name__ == "__main__":
    app()
