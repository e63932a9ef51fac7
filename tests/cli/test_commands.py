"""The command line: right input works in its short form, wrong input is one line and exit status 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from refold.cli import main
from refold.cli.app import app
from refold.errors import HealError
from refold.recipe.heal import HealStage

FLAGS = {
    "demo": {"--out", "--heal-tokens", "--json"},
    "analyse": {
        "--data", "-d", "--out", "--tokens", "-t", "--context", "--seed", "--moments", "--no-spectra", "--device",
        "--field", "--overwrite", "--json",
    },
    "plan": {"--recipe", "-r", "--set", "--measurements", "--context", "--lines", "--allow-larger", "--json"},
    "recipes": {"--protocols", "--json"},
    "convert": {
        "--recipe", "-r", "--set", "--calibration", "--measurements", "--device", "--overwrite", "--allow-larger",
        "--field", "--json",
    },
    "heal": {
        "--data", "-d", "--field", "--tokens", "-t", "--protocol", "-p", "--recipe", "-r", "--set", "--objective",
        "--learning-rate", "--batch-tokens", "--context", "--seed", "--held-out", "--teacher", "--teacher-tokens",
        "--sweep", "--dry-run", "--sharded", "--report-to", "--device", "--overwrite", "--restart", "--json",
    },
    "evaluate": {
        "--data", "-d", "--against", "--context", "--stride", "--max-tokens", "--batch-size", "--device", "--dtype",
        "--field", "--quantise", "--out", "--json",
    },
    "run": {
        "--data", "-d", "--recipe", "-r", "--set", "--tokens", "-t", "--held-out", "--baseline", "--learning-rate",
        "--field", "--eval-tokens", "--seed", "--device", "--allow-larger", "--json",
    },
    "inspect": {"--verify", "--json"},
    "generate": {
        "--prompt", "-p", "--chat", "--stream", "--max-new-tokens", "--temperature", "--top-p", "--top-k", "--seed",
        "--save-state", "--state", "--overwrite", "--adapters", "--exit-depth", "--device", "--dtype",
    },
    "export": {"--to", "--dtype", "--overwrite"},
}  # fmt: skip


def run(*arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs the command line in this process and returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["refold", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_flags_are_these() -> None:
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    found = {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("-")}
        for name, command in commands.items()
    }
    assert found == FLAGS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "/nowhere"], "no such folder"),
        (["plan", "SOURCE", "-r", "relaxt"], "did you mean 'relaxed'"),
        (["plan", "SOURCE", "--set", "fold.lops=2"], "did you mean 'loops'"),
        (["plan", "SOURCE", "-r", "recursive", "--set", "fold.init=[0,99,1,2,3,4]"], "out of range"),
        (["convert", "SOURCE", "EXISTING"], "never overwritten"),
        (["convert", "SOURCE", "OUT", "--calibration", "LATIN"], "calibration: a recipe that has a use for text"),
        (["analyse", "/nowhere"], "no such folder"),
        (["analyse", "SOURCE", "--out", "EXISTING"], "never overwritten"),
        (["analyse", "SOURCE", "--data", "LATIN"], "UTF-8"),
        (["analyse", "SOURCE", "--moments"], "give --out DIR"),
        (["analyse", "SOURCE", "--tokens", "1"], "at least 2 tokens"),
        (["plan", "SOURCE", "-r", "pruned", "--measurements", "EXISTING"], "make them with `refold analyse"),
        (["plan", "SOURCE", "--measurements", "LATIN"], "measurements of format 1 are required"),
        (["convert", "SOURCE", "OUT", "--set", "drop.mlp={count: 1, by: similarity}"], "--measurements DIR"),
        (["inspect", "SOURCE"], "a folded model is required"),
        (["evaluate", "SOURCE", "--data", "/nowhere"], "required"),
        (["evaluate", "SOURCE", "--data", "LATIN"], "UTF-8"),
        (["evaluate", "SOURCE", "--data", "LATIN", "--quantise", "int3"], "must be one of int8, int4 (got 'int3')"),
        (["heal", "SOURCE", "OUT", "--data", "LATIN", "--tokens", "many"], "many"),
        (["generate", "SOURCE", "-p", "x", "--chat"], "chat template"),
        (["generate", "SOURCE"], "give --prompt, or --state to go on"),
        (["generate", "SOURCE", "-p", "x", "--save-state", "LATIN"], "it exists"),
        (["generate", "SOURCE", "-p", "x", "--save-state", "LATIN", "--overwrite"], "got another file"),
        (["generate", "SOURCE", "-p", "x", "--save-state", "NEW", "--stream"], "nothing is generated with it"),
        (["generate", "SOURCE", "--state", "LATIN"], "a whole state file is required"),
        (["generate", "SOURCE", "--state", "NEW"], "write one with --save-state"),
        (["export", "SOURCE", "OUT", "--to", "gguf"], "dense"),
        (["run", "SOURCE", "EXISTING", "--data", "LATIN"], "required"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    arguments: list[str],
    says: str,
    shipped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "SOURCE": shipped,
        "OUT": tmp_path / "out",
        "EXISTING": tmp_path / "mine",
        "LATIN": tmp_path / "latin.txt",
        "NEW": tmp_path / "new.state",
    }
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    status = run(*(places.get(argument, argument) for argument in arguments), monkeypatch=monkeypatch)
    errors = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in errors
    assert says in " ".join(errors.split()), errors
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("given", "expected"), [((), 3), (("--seed", "0"), 0), (("--seed", "5"), 5)])
def test_a_seed_goes_over_the_recipes_zero_too(
    given: tuple[str, ...], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def heal(model: str, out: Path, data: object, stages: tuple[HealStage, ...], **_: object) -> None:
        seeds.extend(stage.seed for stage in stages)
        raise HealError("heal: enough seen")

    monkeypatch.setattr("refold.healing.heal.heal", heal)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("heal: [{tokens: 1000, seed: 3}]")
    assert run("heal", "model", tmp_path / "out", "-d", "text", "-r", recipe, *given, monkeypatch=monkeypatch) == 2
    assert seeds == [expected]


def test_the_whole_way_by_hand(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"def number_{index}():\n    return {index}\n" for index in range(3000)))
    folded, healed, dense = tmp_path / "folded", tmp_path / "healed", tmp_path / "dense"
    assert run("convert", shipped, folded, "-r", "joint", monkeypatch=monkeypatch) == 0
    small = ("--batch-tokens", "512", "--context", "64")
    assert run("heal", folded, healed, "-d", text, "-t", "2k", *small, monkeypatch=monkeypatch) == 0
    assert run("inspect", healed, "--verify", monkeypatch=monkeypatch) == 0
    assert run("export", healed, dense, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    windows = ("--max-tokens", "1k", "--context", "64", "--json")
    assert run("evaluate", healed, "-d", text, "--against", shipped, *windows, monkeypatch=monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["against"]["agreement"] > 0
    assert run("evaluate", healed, "-d", text, "--quantise", "int4", *windows, monkeypatch=monkeypatch) == 0
    quantised = json.loads(capsys.readouterr().out)["model"]
    assert quantised["quantised"] == "int4"
    assert quantised["weight_bytes"] < 0.6 * found["model"]["weight_bytes"]
    assert run("evaluate", dense, "-d", text, *windows, monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=0.01)
    assert run("generate", healed, "-p", "def f", "--max-new-tokens", "4", monkeypatch=monkeypatch) == 0
    plain = capsys.readouterr().out
    streamed = ("generate", healed, "-p", "def f", "--max-new-tokens", "4", "--stream")
    assert run(*streamed, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == plain


def test_a_prompt_read_once_is_gone_on_from(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.state", tmp_path / "second.state"
    few = ("--max-new-tokens", "6")
    assert run("generate", shipped, "-p", "def add(a,", "--save-state", first, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "tokens read; " in printed.err
    before = first.read_bytes()
    assert run("generate", shipped, "--state", first, "-p", " b):", *few, monkeypatch=monkeypatch) == 0
    forked = capsys.readouterr().out
    assert run("generate", shipped, "-p", "def add(a, b):", *few, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == forked
    further = ("--state", first, "-p", " b):", "--save-state", second)
    assert run("generate", shipped, *further, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert run("generate", shipped, "--state", second, "--stream", *few, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == forked
    assert first.read_bytes() == before


def test_memory_at_long_contexts_is_shown(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folded = tmp_path / "recipe.yaml", tmp_path / "folded"
    recipe.write_text("mixers: [{type: retention, except: [1]}]")
    wanted = (shipped, "-r", recipe, "--allow-larger")
    assert run("plan", *wanted, monkeypatch=monkeypatch) == 0
    table = capsys.readouterr().out
    assert run("plan", *wanted, "--json", monkeypatch=monkeypatch) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert [each["context"] for each in memory["cache_and_state"]] == [1024, 32768, 1048576]
    said = f"less memory than its source (weights, cache and state): from {memory['smaller_from']:,} tokens on"
    assert "cache + state at 1,048,576" in table
    assert said in table
    assert run("convert", shipped, folded, "-r", recipe, "--allow-larger", monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert run("inspect", folded, monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    assert said in shown
    assert "cache + state at 32,768" in shown
    assert run("inspect", folded, "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["memory"] == memory
    assert run("plan", shipped, "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["pruned"]["memory"]["smaller_from"] == 0


def test_plan_prints_json_that_convert_would_write(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", shipped, "-r", "relaxed", "--json", monkeypatch=monkeypatch) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["format"] == 1
    assert plan["cost"]["target"]["parameters"] < plan["cost"]["source"]["parameters"]
    assert run("plan", shipped, monkeypatch=monkeypatch) == 0
    assert "pruned" in capsys.readouterr().out


def test_recipes_can_be_printed_and_used_by_path(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("recipes", "joint", monkeypatch=monkeypatch) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert run("plan", shipped, "-r", tmp_path / "mine.yaml", monkeypatch=monkeypatch) == 0


def test_the_installed_command_answers() -> None:
    done = subprocess.run([sys.executable, "-m", "refold.cli", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("refold ")


def test_a_column_is_named_once_for_all_files_and_kinds_are_reported(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"body": f"def f{number}(x):\n    return x + {number}\n", "text": ""} for number in range(6)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.csv").write_text("id,body\n" + "".join(f"{n},import os as o{n}\n" for n in range(6)))
    data = ("--data", tmp_path / "a.json", "--data", tmp_path / "b.csv")
    assert run("evaluate", shipped, *data, "--field", "body", "--json", monkeypatch=monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(kind["name"]).name for kind in found["kinds"]] == ["a.json", "b.csv"]
    assert found["bytes"] == sum(kind["bytes"] for kind in found["kinds"]) > 200
    assert run("evaluate", shipped, *data, "--field", "body", monkeypatch=monkeypatch) == 0
    assert "kind of text" in capsys.readouterr().out
    assert run("evaluate", shipped, "--data", tmp_path / "b.csv", monkeypatch=monkeypatch) == 2
    assert "column 'text' is required (got ['body', 'id'])" in capsys.readouterr().err
