"""Options of a fit beside its budget, and the range of a sweep."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from refold.errors import RefoldError
from refold.progress import Show
from refold.suggest import must_be_one_of, shorten

if TYPE_CHECKING:
    from refold.fitting.budget import Budget

BUDGET_NAMES: Mapping[str, str] = {
    "bytes": "bytes",
    "cache": "cache",
    "flops": "flops",
    "latency": "milliseconds",
}
"""Name of each limit in the command line and in `parse_budget`, with its quantity of `Costs`."""
MATRIX_CLASSES = ("bits", "rank", "rank and bits")
TIE = "tie"
DEFAULT_POINTS, MOST_POINTS, MOST_LOOKS = 8, 50, 100
_RANGE = re.compile(r"(?:(?P<name>[a-z]+)=)?(?P<first>[\d.]+)%\.\.(?P<last>[\d.]+)%(?::(?P<count>\d+))?", re.ASCII)


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit.

    Attributes:
        tokens: Tokens of healing; 0: none.
        calibration_tokens: Tokens of text that are measured on.
        singles: Whether single methods are measured at the same budget.
        eval_tokens: Held-out tokens on which the result and single methods are measured; candidates are compared on a
            quarter of it, of other text.
        engine: Engine or format that must run the result; None or `any`: refold.
        device_table: File of `refold fit --measure-device`, from which milliseconds are taken.
        looks: Number of candidates that are converted and evaluated.
        without: Kinds of choice that may not be used, such as `width` or `rank`.
        smallest: Quantity to make smallest within a loss: `bytes`, `cache`, `flops` or `latency`.
        trim_vocabulary: Whether tokens that the text never uses may be dropped.
        seed: Seed of all random numbers.
        overwrite: Replace OUT if refold wrote it.
        device: Device for measurements, training and evaluation; None: the best available device.
        dry_run: Make a forecast and write nothing.
        command: Command line, recorded in the provenance.
        show: Shows the progress.

    Raises:
        RefoldError: A value is out of its range, or a name is unknown.
    """

    tokens: int = 0
    calibration_tokens: int = 16_384
    eval_tokens: int = 32_768
    engine: str | None = None
    device_table: Path | None = None
    looks: int = 4
    singles: bool = True
    without: tuple[str, ...] = ()
    smallest: str = "bytes"
    trim_vocabulary: bool = False
    seed: int = 0
    overwrite: bool = False
    device: str | None = None
    dry_run: bool = False
    command: str = ""
    show: Show = field(default_factory=Show)

    def __post_init__(self) -> None:
        least = {"tokens": 0, "calibration_tokens": 2, "eval_tokens": 2}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise RefoldError(
                    f"fit: {name} must be at least {number} (got {shorten(getattr(self, name))}); raise them"
                )
        if not 1 <= self.looks <= MOST_LOOKS:
            raise RefoldError(f"fit: looks must lie in 1..{MOST_LOOKS} (got {shorten(self.looks)}); choose another")
        if self.smallest not in BUDGET_NAMES:
            raise RefoldError(f"fit: smallest {must_be_one_of(self.smallest, BUDGET_NAMES)}")
        if self.engine not in (None, "any"):
            from refold.exporting.registry import targets_for

            targets_for(self.engine)  # pyright: ignore[reportArgumentType]
        if self.without:
            legal = choice_names()
            for name in self.without:
                if name not in legal:
                    raise RefoldError(f"fit: without: a kind of choice {must_be_one_of(name, legal)}")
            if set(legal) <= set(self.without):
                raise RefoldError("fit: without: at least one kind of choice must stay (got all); name fewer")

    def looks_at_each(self, num_budgets: int) -> int:
        """Returns the number of looks for each of several budgets: half, because corrections serve all of them."""
        return self.looks if num_budgets == 1 else max(1, self.looks // 2)


def choice_names() -> tuple[str, ...]:
    """Returns the names of all kinds of choice that can be left out: classes of matrices, kinds of parts, ties."""
    # Kinds are imported only when they are named, because they need torch.
    from refold.fitting.kinds.registry import PART_KINDS

    return (*MATRIX_CLASSES, *(kind.name for kind in PART_KINDS if kind.name != "whole"), TIE)


class SweepRange(NamedTuple):
    """Budgets at equal distances.

    Attributes:
        name: Name of the limit: `bytes`, `cache`, `flops` or `latency`.
        first: First budget, in percent of the source.
        last: Last budget, above the first.
        count: Number of budgets.
    """

    name: str
    first: float
    last: float
    count: int

    def budgets(self) -> tuple[str, ...]:
        """Returns the budgets as `parse_budget` reads them, such as `25%`."""
        step = (self.last - self.first) / (self.count - 1)
        return tuple(f"{round(self.first + index * step, 2):g}%" for index in range(self.count))


def read_sweep_range(text: str) -> SweepRange:
    """Parses `[NAME=]FIRST%..LAST%[:COUNT]`, such as `25%..80%` or `cache=10%..50%:5`.

    Raises:
        RefoldError: The text has another form, the name is unknown, or the range is empty or too long.
    """
    match = _RANGE.fullmatch(text.replace(" ", ""))
    name = "bytes" if match is None else match["name"] or "bytes"
    if match is None or match["first"].count(".") > 1 or match["last"].count(".") > 1:
        raise RefoldError(
            f"fit: sweep must be [QUANTITY=]FIRST%..LAST%[:COUNT] such as 25%..80% or cache=10%..50%:5 "
            f"(got {shorten(text)})"
        )
    if name not in BUDGET_NAMES:
        raise RefoldError(f"fit: sweep: the quantity {must_be_one_of(name, BUDGET_NAMES)}")
    found = SweepRange(name, float(match["first"]), float(match["last"]), int(match["count"] or DEFAULT_POINTS))
    if not 0 < found.first < found.last < 100:
        raise RefoldError(
            f"fit: sweep must go up, from above 0% to below 100% (got {found.first:g}% to {found.last:g}%)"
        )
    if not 2 <= found.count <= MOST_POINTS:
        raise RefoldError(f"fit: sweep must have 2..{MOST_POINTS} budgets (got {found.count}); choose another count")
    return found


def check_request(given: Mapping[str, Any]) -> None:
    """Checks that the options of `refold fit` fit together, before anything is read.

    Args:
        given: The value of each argument and option that was given, by its name with underscores (`max_loss`).

    Raises:
        RefoldError: Two options contradict each other, or one lacks another; the message names both.
    """
    given = {name.rstrip("_").replace("_", "-"): value for name, value in given.items()}
    if "measure-device" in given:
        others = [name for name in given if name not in ("measure-device", "source", "device", "json", "overwrite")]
        if others:
            raise RefoldError(
                f"fit: --measure-device only measures this machine (got {_shown(others[0])} too); run it first, alone"
            )
        return
    for name, why in (("source", "a source (SOURCE)"), ("out", "a folder to write (OUT)")):
        if name not in given:
            raise RefoldError(
                f"fit: {why} is required (got none); type `refold fit SOURCE OUT --bytes 35% --data FILE`"
            )
    _check_budget(given)
    _check_clock(given)
    if "data" not in given:
        raise RefoldError(
            "fit: text to measure on is required (got no --data); best several kinds: --data A=0.5 --data B=0.5"
        )
    if "sweep" in given and given.get("tokens"):
        raise RefoldError(
            "fit: a sweep is measured unhealed (got --sweep and --tokens); sweep first, then fit one of its budgets "
            "with --tokens"
        )


def _check_budget(given: Mapping[str, Any]) -> None:
    """Checks limits, `max-loss`, `smallest` and `sweep` against each other."""
    wanted = [name for name in (*BUDGET_NAMES, "max-loss") if name in given]
    swept = read_sweep_range(given["sweep"]).name if "sweep" in given else None
    if not wanted and swept is None:
        raise RefoldError(
            "fit: a budget is required (got none); give --bytes 35%, --cache, --flops, --latency, --max-loss or --sweep"
        )
    if swept is not None and (swept in wanted or "max-loss" in wanted):
        other = swept if swept in wanted else "max-loss"
        raise RefoldError(f"fit: --sweep goes through budgets of {swept} (got --{other} too); give one of the two")
    if "smallest" in given and "max-loss" not in wanted:
        raise RefoldError(
            "fit: --smallest goes with a loss (got no --max-loss); give --max-loss 0.05, or a limit instead"
        )
    smallest = given.get("smallest", "bytes")
    if "max-loss" in wanted and smallest in wanted:
        raise RefoldError(
            f"fit: --max-loss asks for the fewest {smallest} (got --{smallest} too); give one of the two, or make "
            "another quantity smallest with --smallest"
        )


def _check_clock(given: Mapping[str, Any]) -> None:
    """Checks that a limit of time has the table of a device, and the reverse."""
    swept = read_sweep_range(given["sweep"]).name if "sweep" in given else None
    is_timed = "latency" in (*given, swept, given.get("smallest"))
    if "on" in given and not is_timed:
        raise RefoldError("fit: --on is the table for a limit of time (got no --latency); give --latency 20ms too")
    if is_timed and "on" not in given:
        raise RefoldError(
            "fit: a limit of time needs the table of a device (got no --on); make one with "
            "`refold fit --measure-device laptop.json` and give --on laptop.json"
        )


def _shown(name: str) -> str:
    return name.upper() if name == "out" else f"--{name}"


def read_budgets(limits: Mapping[str, Any], context: int, sweep: str | None = None) -> tuple["Budget", ...]:
    """Returns the budget of a fit, or those of a sweep, the smallest first.

    Args:
        limits: The limits as written, by their names in `parse_budget`: `bytes`, ..., `max_loss`.
        context: Tokens at which cache, FLOPs and time are counted.
        sweep: Range of a sweep as written.

    Raises:
        RefoldError: A limit is no amount of its quantity, or the range is invalid.
    """
    from refold.fitting.budget import parse_budget

    if sweep is None:
        return (parse_budget(**limits, context=context),)
    found = read_sweep_range(sweep)
    return tuple(parse_budget(**{**limits, found.name: text}, context=context) for text in found.budgets())
