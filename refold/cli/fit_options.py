"""Command-line options of `refold fit`, in the groups of its help."""

from pathlib import Path
from typing import Annotated

import typer

from refold.cli.options import amount, real, whole

_BUDGET, _CHOICE, _TEXT, _RUN = "Budget, one or several", "Choice", "Text", "Run"
_FIELD_HELP = "JSON field, or CSV or parquet column, with the text. Default: text."

FitSource = Annotated[
    str | None,
    typer.Argument(help="Folder of a transformers checkpoint, or hub id `org/name` or `org/name@revision`."),
]
FitOut = Annotated[
    Path | None,
    typer.Argument(help="Folder to write: model, recipe, report. After an interruption the same command goes on."),
]
BytesLimit = Annotated[
    str | None,
    typer.Option("--bytes", metavar="LIMIT", help="Stored bytes: 35%, 800MB or 1.5GB.", rich_help_panel=_BUDGET),
]
CacheLimit = Annotated[
    str | None,
    typer.Option(metavar="LIMIT", help="Cache of a sequence at the context: 25%, 40MB.", rich_help_panel=_BUDGET),
]
FlopsLimit = Annotated[
    str | None,
    typer.Option(metavar="LIMIT", help="FLOPs of a token at the context: 70%, 12GFLOPs.", rich_help_panel=_BUDGET),
]
LatencyLimit = Annotated[
    str | None,
    typer.Option(metavar="LIMIT", help="Time of a decoded token: 20ms, 60%. Needs --on.", rich_help_panel=_BUDGET),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        parser=real,
        metavar="NATS",
        help="Largest loss a token, such as 0.05: the smallest model within it.",
        rich_help_panel=_BUDGET,
    ),
]
Smallest = Annotated[
    str | None,
    typer.Option(
        metavar="QUANTITY",
        help="With --max-loss, make this smallest: bytes, cache, flops or latency. Default: bytes.",
        rich_help_panel=_BUDGET,
    ),
]
SweepBudgets = Annotated[
    str | None,
    typer.Option(
        "--sweep",
        metavar="A%..B%[:N]",
        help="N budgets from A to B and a page of all; of bytes, or of another quantity: cache=10%..50%.",
        rich_help_panel=_BUDGET,
    ),
]
FitContext = Annotated[
    int | None,
    typer.Option(
        "--context",
        parser=whole(1),
        metavar="N",
        help="Tokens at which cache, FLOPs and time are counted. Default: 8192.",
        rich_help_panel=_BUDGET,
    ),
]
On = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Table of the device, by --measure-device.", rich_help_panel=_BUDGET),
]
ForEngine = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="ENGINE",
        help="Only choices that this engine or format holds: llama.cpp, vllm, any, ...",
        rich_help_panel=_CHOICE,
    ),
]
Without = Annotated[
    str | None,
    typer.Option(
        metavar="KIND,KIND", help="Kinds of choice to leave out: width,mixer,rank,tie,...", rich_help_panel=_CHOICE
    ),
]
TrimVocabulary = Annotated[
    bool,
    typer.Option("--trim-vocabulary", help="Allow dropping tokens that no text uses.", rich_help_panel=_CHOICE),
]
NoSingles = Annotated[
    bool,
    typer.Option(
        "--no-singles",
        help="Do not measure single methods at the same budget, which takes longer than the fit.",
        rich_help_panel=_CHOICE,
    ),
]
Looks = Annotated[
    int | None,
    typer.Option(
        parser=whole(1),
        metavar="N",
        help="Candidates to convert and evaluate before one is chosen. Default: 4.",
        rich_help_panel=_CHOICE,
    ),
]
HealFor = Annotated[
    int | None,
    typer.Option(
        *("--tokens", "-t"),
        parser=amount,
        metavar="AMOUNT",
        help="Tokens of healing, such as 20M. Default: 0, no healing.",
        rich_help_panel=_CHOICE,
    ),
]
FitData = Annotated[
    list[str] | None,
    typer.Option(
        *("--data", "-d"),
        metavar="FILE",
        help="Calibration text; best of several kinds with weights: A=0.5. Repeatable.",
        rich_help_panel=_TEXT,
    ),
]
FitHeldOut = Annotated[
    list[str] | None,
    typer.Option(
        "--held-out",
        metavar="FILE",
        help="Text to measure losses on; one kind should be in no --data. Repeatable.",
        rich_help_panel=_TEXT,
    ),
]
FitField = Annotated[str | None, typer.Option("--field", metavar="NAME", help=_FIELD_HELP, rich_help_panel=_TEXT)]
MeasuredTokens = Annotated[
    int | None,
    typer.Option(
        "--calibration-tokens",
        parser=amount,
        metavar="AMOUNT",
        help="Tokens of calibration text to measure on. Default: 16k.",
        rich_help_panel=_TEXT,
    ),
]
ScoredTokens = Annotated[
    int | None,
    typer.Option(
        "--eval-tokens",
        parser=amount,
        metavar="AMOUNT",
        help="Held-out tokens to score for the report. Default: 32k.",
        rich_help_panel=_TEXT,
    ),
]
MeasureDevice = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Measure this machine for --on, write FILE, and stop.", rich_help_panel=_RUN),
]
FitDryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show the steps, tokens and expected time; write nothing.", rich_help_panel=_RUN),
]
FitSeed = Annotated[
    int | None,
    typer.Option("--seed", parser=whole(0), metavar="N", help="Seed. Default: 0.", rich_help_panel=_RUN),
]
FitDevice = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", help="cuda, mps or cpu. Default: the best one there is.", rich_help_panel=_RUN
    ),
]
FitOverwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if refold wrote it.", rich_help_panel=_RUN)
]
FitJson = Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.", rich_help_panel=_RUN)]
