"""Types and parsers of command-line options."""

import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from refold.suggest import MAX_NUMBER, shorten


def amount(text: str | int) -> int:
    """Parses an amount of tokens such as `20M`, `1.5k` or a plain number.

    Raises:
        typer.BadParameter: The text is no amount.
    """
    from refold.fields import read_amount

    try:
        number = read_amount(text)
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"must be a whole number such as 20M (got {shorten(text)})")
        return number
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def whole(least: int) -> Callable[[str | int], int]:
    """Returns a parser for an option whose value is a whole number of at least `least`."""

    def parse(text: str | int) -> int:
        try:
            number = int(text)
        except ValueError:
            raise typer.BadParameter(f"must be a whole number (got {shorten(text)})") from None
        if number < least:
            raise typer.BadParameter(f"must be at least {least} (got {shorten(number)})")
        if number > MAX_NUMBER:
            raise typer.BadParameter(f"must be at most {MAX_NUMBER} (got {shorten(number)})")
        return number

    return parse


def real(text: str | float) -> float:
    """Parses a finite number.

    Raises:
        typer.BadParameter: The text is no number, or the number is not finite.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise typer.BadParameter(f"must be a finite number (got {shorten(text)})")
    return number


SourceOption = Annotated[
    str, typer.Argument(help="Folder of a transformers checkpoint, or hub id `org/name` or `org/name@revision`.")
]
Model = Annotated[str, typer.Argument(help="A folded model's folder; a source's folder or hub id works too.")]
FoldedModel = Annotated[str, typer.Argument(help="Folder, or hub id, of a folded model; a source needs no export.")]
Out = Annotated[Path, typer.Argument(help="Folder to write. It is complete afterwards, or does not exist.")]
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
FieldOption = Annotated[
    str | None, typer.Option("--field", help="JSON field, or CSV or parquet column, with the text. Default: text.")
]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. Default: the best one there is.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: as stored, or float32 where that is slow.")
]
MeasurementsOption = Annotated[
    str | None, typer.Option(help="Folder written by `refold analyse`: drops by similarity follow its measurements.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if refold wrote it.")]
AllowLarger = Annotated[
    bool, typer.Option("--allow-larger", help="Accept a folded model that is smaller than its source in nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the settings and the expected time, and write nothing.")]
HealTokens = Annotated[
    int | None,
    typer.Option(
        *("--tokens", "-t"),
        parser=amount,
        metavar="AMOUNT",
        help="Training tokens of all stages, such as 20M. Default: the recipe's.",
    ),
]
HeldOutOption = Annotated[list[str] | None, typer.Option(help="Held-out text for evaluation. Repeatable.")]
Protocol = Annotated[
    str | None, typer.Option("--protocol", "-p", help="A built-in protocol (`refold recipes --protocols`).")
]
HealRecipe = Annotated[
    str | None, typer.Option("--recipe", "-r", help="Built-in recipe or YAML file; its `heal` section is run.")
]
HealSet = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One key of all stages, `heal.learning_rate=1e-3`. Repeatable."),
]
TeacherOption = Annotated[str | None, typer.Option(help="Folder or hub id. Default: the source MODEL was folded from.")]
Sweep = Annotated[
    str | None, typer.Option(metavar="lr", help="`lr`: try a third, one and three times the learning rate first.")
]
Sharded = Annotated[
    bool, typer.Option("--sharded", help="Under torchrun: spread the weights over the processes (FSDP2).")
]
ReportTo = Annotated[list[str] | None, typer.Option(help="tensorboard, wandb or trackio, where installed. Repeatable.")]
Restart = Annotated[bool, typer.Option("--restart", help="Drop an unfinished run instead of resuming it.")]
Baselines = Annotated[
    list[str] | None,
    typer.Option(help="pruned, lowrank, quantised, trained-source, scratch or none. Repeatable."),
]
EvalTokens = Annotated[
    int | None,
    typer.Option(
        parser=amount,
        metavar="AMOUNT",
        help="Held-out tokens to score. Default: a quarter of the healing tokens, 8k to 200k.",
    ),
]


# Of `analyse`.
AnalysisTokens = Annotated[
    int,
    typer.Option("--tokens", "-t", parser=amount, metavar="AMOUNT", help="Tokens to run, from all over the text."),
]
Context = Annotated[int, typer.Option(parser=whole(2), metavar="N", help="Tokens of each sequence.")]
Seed = Annotated[int, typer.Option(parser=whole(0), metavar="N", help="Seed of random numbers.")]
MomentsOption = Annotated[bool, typer.Option("--moments", help="Also store second moments of linears' inputs.")]
NoSpectra = Annotated[bool, typer.Option("--no-spectra", help="Skip the slow measurement of the loss by tying.")]
# Of `evaluate`.
Against = Annotated[str | None, typer.Option(help="Also compare with this model: agreement, KL, difference.")]
WindowContext = Annotated[
    int | None,
    typer.Option("--context", parser=whole(1), metavar="N", help="Tokens in a window. Default: as the model."),
]
Stride = Annotated[
    int | None,
    typer.Option(parser=whole(1), metavar="N", help="Tokens from one window to the next. Default: half the context."),
]
MaxTokens = Annotated[
    int | None, typer.Option(parser=amount, metavar="AMOUNT", help="Read no more than this, such as 200k.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(parser=whole(1), metavar="N", help="Windows at a time. Default: as many as have 4,096 tokens."),
]
Quantise = Annotated[
    str | None, typer.Option(help="int8 or int4: round the weights of linears, and count their bytes so.")
]
ResultFile = Annotated[Path | None, typer.Option("--out", help="Also write the result to this file as JSON.")]
# Of `generate`.
PromptOption = Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue; `-` reads standard input.")]
Chat = Annotated[bool, typer.Option("--chat", help="The prompt is a user's message: apply the chat template.")]
Stream = Annotated[bool, typer.Option("--stream", help="Print text as it comes.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(parser=whole(1), metavar="N", help="New tokens, at most. Default: 128.")
]
Temperature = Annotated[float, typer.Option(parser=real, metavar="X", help="0: always the likeliest token.")]
TopP = Annotated[
    float, typer.Option(parser=real, metavar="X", help="Sample from the likeliest tokens of this total probability.")
]
TopK = Annotated[int, typer.Option(parser=whole(0), metavar="N", help="Sample from the N likeliest tokens; 0: all.")]
SaveState = Annotated[
    Path | None, typer.Option(help="Read the prompt, write the model's state after it to this file, and stop.")
]
StateOption = Annotated[
    Path | None, typer.Option(help="Continue a state of --save-state; the prompt, if any, follows it.")
]
Adapters = Annotated[
    str | None, typer.Option(help="Folder healed from MODEL with `--protocol domain`: its adapters instead.")
]
ExitDepth = Annotated[int | None, typer.Option(parser=whole(1), metavar="N", help="Run only the first N depths.")]


def command_line() -> str:
    """Returns the command as typed, for the provenance."""
    return shlex.join(["refold", *sys.argv[1:]])


def locate_data(data: list[str] | None, field: str | None) -> list[Any] | None:
    """Returns the location of each data argument, with the field of its text."""
    if not data:
        return None
    from refold.data.location import parse_location

    return [parse_location(each, field) for each in data]
