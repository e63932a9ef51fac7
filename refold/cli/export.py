"""`refold export`: writing a model in a format that other software reads."""

from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import note


def command(
    model: options.FoldedModel,
    out: options.Out,
    to: Annotated[
        str, typer.Option("--to", help="Format: dense (a stock transformers folder, LoRAs merged).")
    ] = "dense",
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a model so that it runs without refold."""
    from refold.exporting.export import export

    export(model, out, to, overwrite=overwrite, dtype=dtype, command=options.command_line())
    note(f"written: {out}")
