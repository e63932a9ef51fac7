"""Options that several sub-commands share."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

SourceOption = Annotated[
    str, typer.Argument(help="Folder of a transformers checkpoint, or hub id `org/name[@revision]`.")
]
Model = Annotated[str, typer.Argument(help="A folded model's folder; a source's folder or hub id works too.")]
Out = Annotated[Path, typer.Argument(help="Folder to write. It is there whole afterwards, or not at all.")]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", help="Built-in name (see `refold recipes`) or YAML file.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one recipe key: `fold.loops=3`.")
]
DataOption = Annotated[
    list[str],
    typer.Option("--data", "-d", help="Text, JSON lines, CSV or parquet, or folders. Repeatable: each is reported."),
]
TrainingDataOption = Annotated[
    list[str],
    typer.Option(
        "--data",
        "-d",
        help="Text, JSON lines, CSV, parquet, folders, hf://org/name; several kinds with weights: A=0.7. Repeatable.",
    ),
]
Field = Annotated[
    str | None, typer.Option("--field", help="JSON field, or CSV or parquet column, with the text. Left out: text.")
]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. Left out: the best one there is.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Left out: as stored, or float32 where that is slow.")
]
MeasurementsOption = Annotated[
    str | None, typer.Option(help="What `refold analyse` wrote of the source: what to drop by similarity follows it.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if refold wrote it.")]
AllowLarger = Annotated[
    bool, typer.Option("--allow-larger", help="Accept a target that is smaller than its source in nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def command_line() -> str:
    """The command as typed, for the provenance."""
    return shlex.join(["refold", *sys.argv[1:]])


def locate_data(data: list[str] | None, field: str | None) -> list[Any] | None:
    """Returns data as typed, each with the field that holds its text."""
    if not data:
        return None
    from refold.data.location import parse_location

    return [parse_location(each, field) for each in data]


def parse_amount(text: str | None) -> int | None:
    """Reads `20M`, `1.5k` or a plain number of tokens.

    Raises:
        typer.BadParameter: Anything else.
    """
    if text is None:
        return None
    from refold.fields import read_amount

    try:
        return read_amount(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
