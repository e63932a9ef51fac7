"""Option types of `refold claims`."""

from pathlib import Path
from typing import Annotated

import typer

ScaleName = Annotated[str, typer.Option("--scale", help="tiny, small or gpu: tokens, seeds, and which claims.")]
Only = Annotated[list[str] | None, typer.Option(metavar="NAME", help="One claim, at any scale. Repeatable.")]
ClaimsSource = Annotated[
    str | None, typer.Option("--source", help="Folder or hub id. Default: the shipped model and its text.")
]
ClaimsData = Annotated[list[str] | None, typer.Option("--data", "-d", help="Text for training. Repeatable.")]
ClaimsHeldOut = Annotated[
    list[str] | None,
    typer.Option("--held-out", help="Held-out text, that of the training text first. Repeatable: each is a domain."),
]
Work = Annotated[Path, typer.Option(help="Folder of models and results, which later calls take over.")]
ClaimsTasks = Annotated[Path | None, typer.Option(help="Folder with few-shot tasks, for the claim about their score.")]
EngineResults = Annotated[
    Path | None, typer.Option("--engine", help="JSON of benchmarks/engine_exits.py, for the claim about throughput.")
]
ListClaims = Annotated[bool, typer.Option("--list", help="List the claims, and run nothing.")]
Page = Annotated[Path | None, typer.Option("--out", help="Also write the page, as Markdown, to this file.")]
ReplacePage = Annotated[bool, typer.Option("--overwrite", help="Replace the page if refold wrote it.")]
