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


def bias(text: str | tuple[int, float]) -> tuple[int, float]:
    """Parses `TOKEN=NUMBER`.

    Raises:
        typer.BadParameter: The text is something else.
    """
    if isinstance(text, tuple):
        return text
    token, sign, number = text.partition("=")
    if not sign:
        raise typer.BadParameter(f"must be TOKEN=NUMBER (got {shorten(text)})")
    return whole(0)(token), real(number)


def kept(text: str | tuple[str, str]) -> tuple[str, str]:
    """Parses `PART=FORMAT`.

    Raises:
        typer.BadParameter: The text is something else.
    """
    if isinstance(text, tuple):
        return text
    part, sign, form = text.partition("=")
    if not sign or not part or not form:
        raise typer.BadParameter(f"must be PART=FORMAT such as embeddings=q8_0 (got {shorten(text)})")
    return part, form


SourceOption = Annotated[
    str, typer.Argument(help="Folder of a transformers checkpoint, or hub id `org/name` or `org/name@revision`.")
]
Model = Annotated[str, typer.Argument(help="A folded model's folder; a source's folder or hub id works too.")]
FoldedModel = Annotated[str, typer.Argument(help="Folder, or hub id, of a folded model.")]
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


# Of `export` and `quantise`.
Keep = Annotated[
    list[Any] | None,
    typer.Option(
        parser=kept,
        metavar="PART=FORMAT",
        help="Format of embeddings, head, or tensors by name, if another. Repeatable.",
    ),
]
# Of `quantise`.
Layers = Annotated[
    list[Any] | None,
    typer.Option(
        parser=kept,
        metavar="LINEAR=FORMATS",
        help="Format of a linear in each layer of the source, such as q_proj=int4,int3,float. Repeatable.",
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
QuantiseOption = Annotated[
    str | None, typer.Option(help="int8 or int4: round the weights of linears, and count their bytes so.")
]
# Of `calibrate`.
Tolerance = Annotated[
    list[float] | None,
    typer.Option(
        parser=real,
        metavar="X",
        help="Largest share of tokens that may differ from the full depth's. Default: 0.01. Repeatable: the first is "
        "taken where a request asks for none.",
    ),
]
Confidence = Annotated[
    float, typer.Option(parser=real, metavar="X", help="Probability with which the tolerance is kept.")
]
ConfidenceMeasure = Annotated[
    str | None,
    typer.Option(
        "--measure", help="gate, top1, margin, entropy or agreement. Default: gate if the exits have one, else top1."
    ),
]
Kv = Annotated[
    str | None,
    typer.Option(help="Keys of skipped depths: shared, recompute or propagate. Default: shared if possible."),
]
MaxDocuments = Annotated[
    int, typer.Option("--documents", parser=whole(1), metavar="N", help="Read at most so many documents.")
]
CalibrationTokens = Annotated[
    int | None,
    typer.Option("--tokens", "-t", parser=amount, metavar="AMOUNT", help="Read at most so many tokens, such as 200k."),
]
DocumentContext = Annotated[
    int | None,
    typer.Option("--context", parser=whole(2), metavar="N", help="Tokens to read of each document. Default: 512."),
]
ThresholdsFile = Annotated[
    Path | None, typer.Option("--out", help="File of the thresholds. Default: exits.json in the model's folder.")
]
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
MinP = Annotated[
    float,
    typer.Option(parser=real, metavar="X", help="Sample from tokens with at least this share of the best's chance."),
]
Stop = Annotated[list[str] | None, typer.Option(help="End the text before this string. Repeatable.")]
RepetitionPenalty = Annotated[
    float, typer.Option(parser=real, metavar="X", help="Divides logits of tokens that were there before; 1: off.")
]
PresencePenalty = Annotated[
    float, typer.Option(parser=real, metavar="X", help="Subtracted from logits of tokens in the new text.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(parser=real, metavar="X", help="Subtracted for each occurrence in the new text.")
]
LogitBias = Annotated[
    list[Any] | None,
    typer.Option(parser=bias, metavar="TOKEN=X", help="Number to add to the logit of a token id. Repeatable."),
]
LogprobsOption = Annotated[
    int | None,
    typer.Option(
        "--logprobs", parser=whole(0), metavar="N", help="With --json or --out: log-probabilities, and of N others."
    ),
]
NumChoices = Annotated[int, typer.Option("-n", parser=whole(1), metavar="N", help="Continuations of each prompt.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end token.")]
ReferenceOption = Annotated[
    bool, typer.Option("--reference", help="Use transformers' `generate` instead of the engine, to compare.")
]
PromptsOption = Annotated[
    Path | None, typer.Option("--prompts", help="JSON lines with `prompt` or `messages` and settings; needs --out.")
]
AnswersOption = Annotated[
    Path | None, typer.Option("--out", help="JSON lines to write, in order of completion; an unfinished file goes on.")
]
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
# Of `bench`.
BenchAgainst = Annotated[str | None, typer.Option("--against", help="Also run this model, such as the source.")]
Peers = Annotated[
    bool,
    typer.Option(
        "--peers",
        help="Also run transformers, and llama.cpp if `xllamacpp` and a .gguf file beside the model are there.",
    ),
]
Batches = Annotated[str, typer.Option("--batch", metavar="N,N", help="Numbers of requests that come at once.")]
Rate = Annotated[
    float | None,
    typer.Option(parser=real, metavar="X", help="Also measure under this many random arrivals per second."),
]
PromptTokens = Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Tokens of a prompt.")]
BenchTokens = Annotated[
    int, typer.Option("--max-new-tokens", parser=whole(1), metavar="N", help="New tokens of a request.")
]
Rounds = Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Rounds over all contenders.")]
TakeExits = Annotated[
    bool,
    typer.Option("--exits", help="Let tokens leave at exits, by the thresholds that `refold calibrate` wrote."),
]
DraftSource = Annotated[
    str | None,
    typer.Option("--drafts", help="exit or lookup: guess tokens and verify them together; the text stays the same."),
]
EngineWeights = Annotated[
    str, typer.Option(help="auto, float32, bfloat16, int8 or int4: weights in memory. auto: as stored.")
]
Prices = Annotated[
    str | None, typer.Option(help="YAML file of machine names to prices per hour: adds tokens per unit of money.")
]
BenchFolder = Annotated[
    Path | None, typer.Option("--out", help="Also write bench.json and bench.png into this folder.")
]


def read_numbers(name: str, text: str) -> tuple[int, ...]:
    """Parses whole numbers of at least 1, such as `1,8,32`.

    Raises:
        typer.BadParameter: A part is no such number, or there is none.
    """
    try:
        return tuple(whole(1)(part.strip()) for part in text.split(","))
    except typer.BadParameter as error:
        raise typer.BadParameter(f"--{name}: {error.message}") from None


def command_line() -> str:
    """Returns the command as typed, for the provenance."""
    return shlex.join(["refold", *sys.argv[1:]])


def locate_data(data: list[str] | None, field: str | None) -> list[Any] | None:
    """Returns the location of each data argument, with the field of its text."""
    if not data:
        return None
    from refold.data.location import parse_location

    return [parse_location(each, field) for each in data]
