"""`refold demo`: folding, healing and measuring the model that ships with refold."""

import time
from pathlib import Path
from typing import Annotated

import typer

from refold.cli import options
from refold.cli.show import note, print_json


def command(
    out: Annotated[Path, typer.Option("--out", help="Folder to write the folded models to.")] = Path("refold-demo"),
    heal_tokens: Annotated[
        int,
        typer.Option(
            parser=options.amount, metavar="AMOUNT", help="Healing tokens for each of the three healed models."
        ),
    ] = 100_000,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fold the shipped model in several ways, heal three, measure all. Some minutes on two cores, no network."""
    from refold.cli.demo_tables import demo_data, print_demo
    from refold.studies.demo import demo

    started = time.monotonic()
    found = demo(out, heal_tokens=heal_tokens, say=note)
    if json:
        print_json(demo_data(found))
    else:
        print_demo(found)
        note(f"\nmodels: {out}; {time.monotonic() - started:.0f} s")
