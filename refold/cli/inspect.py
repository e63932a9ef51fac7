"""`refold inspect`: description of a folded model, and verification of its files."""

from pathlib import Path
from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import note, print_json


def command(
    model: Annotated[Path, typer.Argument(help="A folded model's folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Also compare the hash of every file.")] = False,
    json: options.Json = False,
) -> None:
    """Show a folded model's blueprint, cost, history and kept energy."""
    from refold.cli.inspect_tables import print_inspection
    from refold.conversion.inspect import inspect

    found = inspect(model, verify=verify)
    if json:
        print_json(found)
    else:
        print_inspection(found)
    if verify:
        note(f"verified: {found.num_files} files are as they were written")
