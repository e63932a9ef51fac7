"""`refold export`: writing a model in a format that other software reads."""

from pathlib import Path
from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import note, print_json


def command(
    model: options.Model,
    out: Annotated[
        Path | None,
        typer.Argument(
            help="Folder, or file such as model.gguf, to write. It is complete afterwards, or does not exist."
        ),
    ] = None,
    to: Annotated[str, typer.Option("--to", help="Format, such as dense; --list shows all for MODEL.")] = "dense",
    list_: Annotated[bool, typer.Option("--list", help="Show how each format holds MODEL, and write nothing.")] = False,
    quantise: Annotated[
        str | None, typer.Option(help="Format of quantised weights, such as q4_0, int4 or float.")
    ] = None,
    keep: options.Keep = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Write a model so that other engines run it."""
    if list_:
        from refold.cli.export_tables import as_json, print_survey
        from refold.exporting.export import survey

        found = survey(model)
        print_json(as_json(found)) if json else print_survey(found)
        return
    if out is None:
        raise typer.BadParameter("a folder to write is required (got none); give OUT, or --list", param_hint="OUT")
    from refold.exporting.export import write_export
    from refold.exporting.registry import find_target
    from refold.exporting.target import ExportOptions

    numbers = ExportOptions(dtype, quantise, dict(keep or []))
    write_export(model, out, find_target(to), numbers, overwrite, options.command_line(), note)
    note(f"written: {out}")
