"""Command-line options of `refold evaluate` that choose sections of a scorecard, in the groups of its help."""

from pathlib import Path
from typing import Annotated

import typer

from refold.cli.options import whole

_SECTIONS, _TASKS = "Sections", "Tasks"

ScoredModels = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Folders or hub ids, folded or not; each gets a scorecard.")
]
ScoredText = Annotated[
    list[str] | None,
    typer.Option("--data", "-d", help="Text, JSON lines, CSV or parquet, or folders. Repeatable: each is reported."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks", metavar="NAMES", help="Few-shot tasks, groups or files, by comma: seven.", rich_help_panel=_TASKS
    ),
]
TaskData = Annotated[
    Path | None,
    typer.Option(help="Folder with NAME.jsonl of each task. Default: lm-eval asks the hub.", rich_help_panel=_TASKS),
]
Shots = Annotated[
    int | None,
    typer.Option(
        parser=whole(0), metavar="N", help="Examples before an item. Default: the task's.", rich_help_panel=_TASKS
    ),
]
TaskLimit = Annotated[
    int | None,
    typer.Option(parser=whole(1), metavar="N", help="Items of a task, drawn and stratified.", rich_help_panel=_TASKS),
]
Recall = Annotated[bool, typer.Option("--recall", help="Recall by teacher forcing.", rich_help_panel=_SECTIONS)]
ScoreExits = Annotated[bool, typer.Option("--exits", help="Quality by rule for leaving.", rich_help_panel=_SECTIONS)]
Branches = Annotated[bool, typer.Option("--branches", help="A hybrid's branches off.", rich_help_panel=_SECTIONS)]
Noise = Annotated[bool, typer.Option("--noise", help="Loss after noisy text.", rich_help_panel=_SECTIONS)]
Speed = Annotated[bool, typer.Option("--speed", help="Speed, peak memory and state.", rich_help_panel=_SECTIONS)]
SetAmounts = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="AMOUNT=VALUE",
        help="An amount of a section: recall_lengths=512,4k. Repeatable.",
        rich_help_panel=_SECTIONS,
    ),
]
ScoreOut = Annotated[
    Path | None, typer.Option("--out", help="JSON file to write too; for several scorecards, a folder of them.")
]
ScoreSeed = Annotated[int, typer.Option("--seed", parser=whole(0), metavar="N", help="Seed of items, texts and noise.")]
# Of `compare`.
ComparedFiles = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="Files of `refold evaluate`; the first is the baseline.")
]
ComparedOut = Annotated[Path | None, typer.Option("--out", help="Also write the table to this file, as markdown.")]


def split_names(given: list[str] | None) -> tuple[str, ...]:
    """Returns names that are separated by commas or given one by one, each once."""
    names = (name.strip() for each in given or () for name in each.split(","))
    return tuple(dict.fromkeys(name for name in names if name))
