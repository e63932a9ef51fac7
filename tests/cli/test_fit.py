"""`refold fit`: options reach the library, mistakes are one line before anything is read, results are printed."""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from refold.fitting.budget import Budget
from refold.fitting.device_table import DeviceTable, LinearTime, MeasuredMachine, read_table
from refold.fitting.options import FitOptions
from refold.fitting.report import FitReport, FitText
from tests.fitting.conftest import make_report


class Called:
    """Stands in for the library: keeps the arguments and returns a report that is made up."""

    def __init__(self) -> None:
        self.arguments: list[Any] = []
        self.named: dict[str, Any] = {}
        self.report = make_report((0.35,))

    def __call__(self, *arguments: Any, **named: Any) -> FitReport:
        self.arguments, self.named = [*arguments], named
        return self.report


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, Called]:
    found = {"fit": Called(), "sweep": Called()}
    module = ModuleType("refold.fitting.fit")
    module.__dict__.update(found)
    monkeypatch.setitem(sys.modules, "refold.fitting.fit", module)
    monkeypatch.setattr("refold.fitting.fit", module, raising=False)
    return found


TEXT = ("--data", "books.txt=0.5", "--data", "docs.txt=0.5")


def test_the_options_reach_the_library(library: dict[str, Called], command: Callable[..., Any]) -> None:
    done = command(
        *("fit", "model", "out", "--bytes", "35%", "--cache", "25%", "--context", "4096", "--for", "llama.cpp", *TEXT),
        *("--held-out", "stories.txt", "--field", "body", "--tokens", "20M", "--looks", "7", "--without", "rank, tie"),
        *(
            "--seed",
            "3",
            "--device",
            "cpu",
            "--calibration-tokens",
            "4k",
            "--eval-tokens",
            "8k",
            "--trim-vocabulary",
            "--overwrite",
        ),
    )
    assert done.status == 0, done.err
    source, out, budget, how = library["fit"].arguments
    assert (source, out) == ("model", Path("out"))
    assert isinstance(budget, Budget)
    assert (budget.describe(), budget.context) == ("bytes 35%, cache 25% at 4,096 tokens", 4096)
    assert isinstance(how, FitOptions)
    assert (how.tokens, how.calibration_tokens, how.eval_tokens) == (20_000_000, 4000, 8000)
    assert (how.engine, how.looks) == ("llama.cpp", 7)
    assert (how.without, how.seed, how.device) == (("rank", "tie"), 3, "cpu")
    assert how.trim_vocabulary
    assert how.overwrite
    assert how.command.endswith("--overwrite")
    assert [(str(text.place), text.weight, text.field) for text in library["fit"].named["data"]] == [
        ("books.txt", 0.5, "body"),
        ("docs.txt", 0.5, "body"),
    ]
    assert [str(text.place) for text in library["fit"].named["held_out"]] == ["stories.txt"]
    assert "written: out" in done.err


def test_defaults_are_those_of_the_library(library: dict[str, Called], command: Callable[..., Any]) -> None:
    assert command("fit", "model", "out", "--max-loss", "0.05", *TEXT, "--tokens", "0").status == 0
    _, _, budget, how = library["fit"].arguments
    assert budget == Budget(max_loss=0.05)
    assert how == FitOptions(command=how.command, show=how.show)
    assert library["fit"].named["held_out"] is None


def test_a_sweep_has_a_budget_for_each_point(library: dict[str, Called], command: Callable[..., Any]) -> None:
    library["sweep"].report = make_report((0.25, 0.5))
    done = command("fit", "model", "out", "--sweep", "20%..50%:3", "--cache", "40%", *TEXT)
    assert done.status == 0, done.err
    told = [budget.describe() for budget in library["sweep"].arguments[2]]
    assert told == [f"bytes {share}, cache 40% at 8,192 tokens" for share in ("20%", "35%", "50%")]
    assert "bytes limit" in done.out
    assert not library["fit"].arguments


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("model", "out", *TEXT), "a budget is required (got none)"),
        (("model", "--bytes", "35%", *TEXT), "a folder to write (OUT) is required"),
        (("model", "out", "--bytes", "35%"), "text to measure on is required"),
        (("model", "out", "--bytes", "20ms", *TEXT), "--bytes: must be in %"),
        (("model", "out", "--bytes", "35%", "--max-loss", "0.1", *TEXT), "got --bytes too"),
        (("model", "out", "--max-loss", "little", *TEXT), "--max-loss: must be a finite number"),
        (("model", "out", "--bytes", "35%", "--on", "laptop.json", *TEXT), "got no --latency"),
        (("model", "out", "--latency", "20ms", *TEXT), "got no --on"),
        (("model", "out", "--sweep", "80%..25%", *TEXT), "must go up"),
        (("model", "out", "--sweep", "25%..80%", "--tokens", "1M", *TEXT), "got --sweep and --tokens"),
        (("model", "out", "--bytes", "35%", "--for", "lama.cpp", *TEXT), "did you mean 'llama.cpp'"),
        (("model", "out", "--bytes", "35%", "--without", "widht", *TEXT), "must be one of bits, rank"),
        (("model", "out", "--bytes", "35%", "--looks", "0", *TEXT), "--looks: must be at least 1"),
        (("model", "out", "--max-loss", "0", *TEXT), "--max-loss: a number of nats per token above 0"),
        (("model", "out", "--bytes", "35%", "--calibration-tokens", "0", *TEXT), "calibration_tokens must be at least"),
        (("model", "out", "--bytes", "35%", "--eval-tokens", "0", *TEXT), "eval_tokens must be at least"),
        (("--measure-device", "laptop.json", "--bytes", "35%"), "got --bytes too"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_read(
    library: dict[str, Called], command: Callable[..., Any], arguments: tuple[str, ...], says: str
) -> None:
    done = command("fit", *arguments)
    assert done.status == 2
    assert says in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert not library["fit"].arguments
    assert not library["sweep"].arguments


VALUES = ("", "0", "-5", "1", "35%", "0%", "1e999", "nan", "9" * 400, "20ms", "1.5GB", "25%..80%", "cache=10%..50%:3")
VALUES += ("x=..%", "\udce9", "½%", "bytes", "rank,tie", ",", "llama.cpp", "=0.5", "A=0.5")
FLAGS = (
    "--bytes",
    "--cache",
    "--flops",
    "--latency",
    "--on",
    "--context",
    "--max-loss",
    "--smallest",
    "--sweep",
    "--for",
)
FLAGS += (
    "--without",
    "--looks",
    "--tokens",
    "--data",
    "--held-out",
    "--field",
    "--calibration-tokens",
    "--eval-tokens",
)
FLAGS += ("--seed", "--device")


def test_any_options_end_in_a_report_or_one_line(library: dict[str, Called], command: Callable[..., Any]) -> None:
    draw = random.Random(17)
    statuses = Counter()
    for _ in range(300):
        line = ["fit", *draw.choices(("model", "out"), k=draw.choice((1, 2, 2, 2)))]
        for flag in draw.sample(FLAGS, draw.choice((1, 2, 3))):
            line += [flag, draw.choice(VALUES)]
        line += [*TEXT, "--bytes", "50%"] if draw.random() < 0.5 else []
        done = command(*line)
        told = f"{line}: {done.err}"
        assert done.status in (0, 2), told
        assert "internal error" not in done.err, told
        assert done.err.count("\n") == 1, told
        statuses[done.status] += 1
    assert min(statuses[0], statuses[2]) > 10


def test_json_is_the_whole_report(library: dict[str, Called], command: Callable[..., Any]) -> None:
    done = command("fit", "model", "out", "--bytes", "35%", *TEXT, "--json")
    assert FitReport.model_validate(json.loads(done.out)) == library["fit"].report


def test_a_dry_run_shows_tokens_and_seconds(library: dict[str, Called], command: Callable[..., Any]) -> None:
    text = (FitText(name="books", weight=0.25, tokens=4096), FitText(name="docs", weight=0.75, tokens=12_288))
    update = {"is_forecast": True, "points": (), "text": text, "notes": ("looks: 4 candidates",)}
    library["fit"].report = library["fit"].report.model_copy(update=update)
    done = command("fit", "model", "out", "--bytes", "35%", *TEXT, "--dry-run")
    assert done.out.splitlines() == [
        "text: 16,384 tokens to measure on: books 25%, docs 75%",
        "measuring: about 3 minutes",
        "choosing: about 2 seconds",
        "looking: about 2 minutes",
        "together: about 5 minutes",
        "looks: 4 candidates",
    ]
    assert library["fit"].arguments[3].dry_run
    assert "dry run: nothing is written" in done.err


def test_a_device_is_measured_into_a_file(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A module of this name in place of the real one, which loads a model to measure it.
    clock = ModuleType("refold.fitting.device_clock")
    called = []
    machine = MeasuredMachine(processor="abacus", system="none", threads=2, device="cpu", dtype="float32")
    linears = (LinearTime(rows=8, columns=8, scheme=None, batch=1, milliseconds=1.5),)

    def measure(path: Path, source: str | None, settings: SimpleNamespace, progress: Any) -> DeviceTable:
        called.append((source, settings.device))
        table = DeviceTable(machine=machine, linears=linears)
        table.save(path)
        return table

    clock.__dict__.update(measure_device=measure, ClockSettings=SimpleNamespace)
    monkeypatch.setitem(sys.modules, clock.__name__, clock)
    monkeypatch.setenv("COLUMNS", "400")
    path = tmp_path / "laptop.json"
    done = command("fit", "model", "--measure-device", path, "--device", "cpu")
    assert (done.status, called) == (0, [("model", "cpu")]), done.err
    assert read_table(path).linears == linears
    assert "table of abacus, 2 threads" in done.out
    assert f"--latency 20ms --on {path}" in done.out
    assert "pass --overwrite" in command("fit", "--measure-device", path).err
    assert command("fit", "--measure-device", path, "--overwrite").status == 0
    assert called[1:] == [(None, None)]
    path.write_text("{}")
    refused = command("fit", "--measure-device", path, "--overwrite")
    assert "table of `fit --measure-device` is required to be overwritten" in refused.err


def test_the_help_has_groups_and_fits_eighty_columns(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = command("fit", "--help").out.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for group in ("Budget, one or several", "Choice", "Text", "Run"):
        assert f"─ {group} ─" in text
    assert "two bytes a number" in text
