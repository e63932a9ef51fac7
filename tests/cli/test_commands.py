"""The command line: correct input works, wrong input is one line and exit status 2."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from refold.cli import main
from refold.errors import HealError
from refold.recipe.heal import HealStage
from refold.recipe.load import built_in_recipes

LIST_FLAGS = Path(__file__).parents[2] / "scripts" / "list_flags.py"
FLAGS = Path(__file__).with_name("flags.txt")
"""All flags, from `python scripts/list_flags.py`. A setting that is a key of the recipe gets none: --set gives it."""


def run(*arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs the command line in this process and returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["refold", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_flags_are_these() -> None:
    listed = subprocess.run([sys.executable, LIST_FLAGS], capture_output=True, text=True, check=True, timeout=60)
    assert listed.stdout == FLAGS.read_text(), "run `python scripts/list_flags.py > tests/cli/flags.txt` if intended"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "/nowhere"], "no such folder"),
        (["plan", "SOURCE", "-r", "relaxt"], "did you mean 'relaxed'"),
        (["plan", "SOURCE", "--set", "fold.lops=2"], "did you mean 'loops'"),
        (["plan", "SOURCE", "-r", "recursive", "--set", "fold.init=[0,99,1,2,3,4]"], "out of range"),
        (["convert", "SOURCE", "EXISTING"], "never overwritten"),
        (
            ["convert", "SOURCE", "OUT", "--calibration", "LATIN"],
            "calibration: this recipe does not use calibration text",
        ),
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
        (
            ["evaluate", "SOURCE", "--data", "LATIN", "--quantise", "int7"],
            "must be int8, or int2 to int6 with z for zero points and g64 or g128",
        ),
        (["heal", "SOURCE", "OUT", "--data", "LATIN", "--tokens", "many"], "many"),
        (["evaluate", "SOURCE", "--data", "LATIN", "--out", "CONFIG"], "it exists"),
        (["evaluate", "SOURCE", "--data", "LATIN", "--out", "CONFIG", "--overwrite"], "got another file"),
        (["evaluate", "SOURCE", "--data", "LATIN", "--out", "/dev/null", "--overwrite"], "got another file"),
        (["evaluate", "SOURCE", "--data", "LATIN", "--out", "LINK", "--overwrite"], "got another file"),
        (["report", "LATIN", "--out", "OUT"], "a scorecard is required"),
        (["report", "SOURCE", "--out", "CONFIG", "--overwrite"], "a report of `refold report` is required"),
        (["evaluate", "SOURCE", "--data", "LATIN", "--max-tokens", "-5"], "--max-tokens: must be a whole number"),
        (["evaluate", "SOURCE", "--data", "LATIN", "--stride", "0"], "--stride: must be at least 1 (got 0)"),
        (["analyse", "SOURCE", "--tokens", "-5"], "--tokens: must be a whole number"),
        (["plan", "SOURCE", "--context", "x"], "--context: must be a whole number (got 'x')"),
        (["plan", "SOURCE", "--context", "-3"], "--context: must be at least 1 (got -3)"),
        (["demo", "--heal-tokens", "many"], "--heal-tokens: must be a whole number"),
        (["generate", "SOURCE", "-p", "x", "--temperature", "warm"], "--temperature: must be a finite number"),
        (["plan", "SOURCE", "--nope"], "No such option: --nope"),
        (["plan", "SOURCE", "--set", "relax.rank={energy:0.5}"], "write 'energy: 0.5'"),
        (["plan", "SOURCE", "--set", "seed=2024-13-45"], "seed: must be a whole number (got '2024-13-45')"),
        (["plan", "SOURCE", "--set", "mixers=[{type: [mamba]}]"], "type: must be one of"),
        (["plan", "SOURCE", "--set", "heal={protocol: {a: 1}}"], "protocol must be one of"),
        (["export", "SOURCE", "OUT", "--keep", "head=int8"], "keep: quantise is required with it"),
        (["export", "SOURCE"], "a folder to write is required"),
        (["export", "SOURCE", "OUT", "--keep", "head"], "must be PART=FORMAT"),
        (["plan", "SOURCE", "--for", "lama.cp"], "for: must be one of"),
        (
            ["heal", "SOURCE", "OUT", "--data", "LATIN", "-t", "2k", "--sweep", "rank"],
            "--sweep: must be lr (got 'rank')",
        ),
        (["heal", "SOURCE", "OUT", "--data", "LATIN"], "a budget is required (got none); pass --tokens"),
        (["heal", "SOURCE", "OUT", "--learning-rate", "1e-2"], "write --set heal.learning_rate=1e-3"),
        (["heal", "SOURCE", "OUT", "--batch-tokens=2k"], "write --set heal.batch_tokens=2k"),
        (["heal", "SOURCE", "OUT", "--objective=distil"], "write --set heal.objective=distil"),
        (["heal", "SOURCE", "OUT", "--context", "64"], "write --set heal.context=512"),
        (["heal", "SOURCE", "OUT", "--teacher-tokens", "1M"], "write --set heal.teacher_tokens=20M"),
        (["heal", "SOURCE", "OUT", "--seed", "3"], "write --set heal.seed=1"),
        (["run", "SOURCE", "OUT", "--data", "LATIN", "--seed", "3"], "write --set heal.seed=1"),
        (["run", "SOURCE", "OUT", "--data", "LATIN", "--learning-rate", "3"], "write --set heal.learning_rate=1e-3"),
        (["generate", "SOURCE", "-p", "x", "--chat"], "chat template"),
        (["generate", "SOURCE"], "give --prompt, --prompts for a file of them, or --state to go on"),
        (["generate", "SOURCE", "-p", "x", "--out", "OUT"], "--prompts and --out are required together"),
        (["generate", "SOURCE", "--prompts", "LATIN"], "--prompts and --out are required together"),
        (["generate", "SOURCE", "-p", "x", "--prompts", "LATIN", "--out", "OUT"], "no other prompt is allowed"),
        (["generate", "SOURCE", "--prompts", "LATIN", "--out", "OUT", "--stream"], "must be used without --stream"),
        (["generate", "SOURCE", "--prompts", "LATIN", "--out", "OUT"], "latin.txt:1: a JSON object is required"),
        (["generate", "SOURCE", "-p", "x", "--json", "--stream"], "json: must be used without --stream"),
        (["generate", "SOURCE", "-p", "x", "-n", "2", "--stream"], "n: must be 1 with --stream (got 2)"),
        (["generate", "SOURCE", "-p", "x", "--logprobs", "2"], "--json or --out is required to show them"),
        (["generate", "SOURCE", "-p", "x", "--logit-bias", "5"], "--logit-bias: must be TOKEN=NUMBER (got '5')"),
        (["generate", "SOURCE", "-p", "x", "--logit-bias", "5=x"], "--logit-bias: must be a finite number (got 'x')"),
        (["generate", "SOURCE", "-p", "x", "--min-p", "2"], "min_p: must be at least 0 and at most 1 (got 2.0)"),
        (
            ["generate", "SOURCE", "-p", "x", "--reference", "--presence-penalty", "1"],
            "presence_penalty: must be 0 where transformers generates",
        ),
        (["generate", "SOURCE", "-p", "x", "--save-state", "LATIN"], "it exists"),
        (["generate", "SOURCE", "-p", "x", "--save-state", "LATIN", "--overwrite"], "got another file"),
        (["generate", "SOURCE", "-p", "x", "--save-state", "NEW", "--stream"], "nothing is generated with it"),
        (["generate", "SOURCE", "--state", "LATIN"], "a whole state file is required"),
        (["generate", "SOURCE", "--state", "NEW"], "write one with --save-state"),
        (["bench", "SOURCE", "--batch", "1,x"], "--batch: must be a whole number (got 'x')"),
        (["bench", "SOURCE", "--batch", "2000"], "batch: must lie in 1..1024 (got 2000)"),
        (["bench", "SOURCE", "--rate", "0"], "rate: arrivals per second above 0 are required (got 0.0)"),
        (["bench", "SOURCE", "--weights", "int5"], "weights: must be one of"),
        (["bench", "SOURCE", "--prices", "NEW"], "prices: a readable YAML file is required"),
        (["bench", "SOURCE", "--prices", "LATIN"], "not UTF-8"),
        (["bench", "/nowhere"], "no such folder"),
        (["bench", "SOURCE", "--out", "LATIN"], "a writable place is required"),
        (["export", "SOURCE", "OUT", "--to", "denze"], "dense"),
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
        "CONFIG": shipped / "config.json",
        "LINK": tmp_path / "link",
    }
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "latin.txt")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    config = (shipped / "config.json").read_bytes()
    status = run(*(places.get(argument, argument) for argument in arguments), monkeypatch=monkeypatch)
    errors = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in errors
    assert says in " ".join(errors.split()), errors
    assert len(errors.splitlines()) == 1 or " mistakes\n" in errors, errors
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert (shipped / "config.json").read_bytes() == config
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("given", "expected"), [((), 3), (("--set", "heal.seed=0"), 0), (("--set", "heal.0.seed=5"), 5)]
)
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
    small = ("--set", "heal.batch_tokens=512", "--set", "heal.context=64")
    assert run("heal", folded, healed, "-d", text, "-t", "2k", *small, "--dry-run", monkeypatch=monkeypatch) == 0
    assert "4 steps of 512 tokens, context 64, learning rate " in capsys.readouterr().out
    assert not healed.exists()
    assert run("heal", folded, healed, "-d", text, "-t", "2k", *small, "--json", monkeypatch=monkeypatch) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert (stage["batch_tokens"], stage["context"], stage["warmup"]) == (512, 64, 0.1)
    assert 2e-5 <= stage["learning_rate"] <= 4e-3
    assert run("inspect", healed, "--verify", monkeypatch=monkeypatch) == 0
    assert run("export", healed, dense, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    windows = ("--max-tokens", "1k", "--context", "64", "--json")
    assert run("evaluate", healed, "-d", text, "--against", shipped, *windows, monkeypatch=monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"]["against"]["agreement"] > 0
    assert run("evaluate", healed, "-d", text, "--quantise", "int4", *windows, monkeypatch=monkeypatch) == 0
    quantised = json.loads(capsys.readouterr().out)["model"]
    assert quantised["quantised"] == "int4"
    assert quantised["weight_bytes"] < 0.6 * found["model"]["weight_bytes"]
    assert run("evaluate", dense, "-d", text, *windows, monkeypatch=monkeypatch) == 0
    exported = json.loads(capsys.readouterr().out)["text"]
    assert exported["bits_per_byte"] == pytest.approx(found["text"]["bits_per_byte"], rel=0.01)
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
    done = subprocess.run([sys.executable, "-m", "refold", "--version"], capture_output=True, text=True, timeout=60)
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
    found = json.loads(capsys.readouterr().out)["text"]
    assert [Path(kind["name"]).name for kind in found["kinds"]] == ["a.json", "b.csv"]
    assert found["bytes"] == sum(kind["bytes"] for kind in found["kinds"]) > 200
    assert run("evaluate", shipped, *data, "--field", "body", monkeypatch=monkeypatch) == 0
    assert "kind of text" in capsys.readouterr().out
    assert run("evaluate", shipped, "--data", tmp_path / "b.csv", monkeypatch=monkeypatch) == 2
    assert "column 'text' is required (got ['body', 'id'])" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 100])
def test_recipes_side_by_side_are_readable(
    columns: int, shipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run("plan", shipped, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= columns
    table = [line.split() for line in lines if re.match(r"[\w-]+ +[\d.]+ [kMG]B", line)]
    names = [row[0] for row in table]
    assert names[0] == "source"
    assert set(names[1:]) == set(built_in_recipes())  # No name is broken.
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
    sizes = [float(row[1]) * units[row[2]] for row in table[1:]]
    assert sizes == sorted(sizes)
    texts = {row[0]: row[-1] for row in table}
    assert (texts["lowrank"], texts["pruned"], texts["recursive"]) == ("yes", "helps", "-")
    said = " ".join(printed.split())
    assert "floor of the bytes: embedding and head are 8% of the source's parameters" in said
    assert re.search(r"integers do \([\d.]+ kB as int8, [\d.]+ kB as int4\); norms and biases stay floats", said)
    assert "all of them need healing" in said
    assert "needs healing" not in said


def test_a_result_is_replaced_only_when_asked(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("def f():\n    return 1\n" * 20)
    wanted = ("evaluate", shipped, "-d", text, "--max-tokens", "64", "--context", "32", "--out", out)
    assert run(*wanted, monkeypatch=monkeypatch) == 0
    first = out.read_text()
    assert run(*wanted, monkeypatch=monkeypatch) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert out.read_text() == first
    assert run(*wanted, "--overwrite", monkeypatch=monkeypatch) == 0
    assert out.read_text() != first


def test_the_engine_generates_what_transformers_does(shipped: Path, command, tmp_path: Path) -> None:
    # In half precision rounding may decide between two tokens.
    given = ("generate", shipped, "-p", "def add(a, b):", "--max-new-tokens", "12", "--dtype", "float32")
    done = command(*given)
    assert done.status == 0, done.err
    assert done.out == command(*given, "--reference").out == command(*given, "--stream").out
    stop = done.out[4:7]
    stopped = command(*given, "--stop", stop).out
    assert stopped.rstrip("\n") == done.out[: done.out.index(stop)].rstrip("\n")
    shown = json.loads(command(*given, "--json", "-n", "2", "--temperature", "1", "--logprobs", "1").out)
    assert len(shown["choices"]) == 2
    assert all(len(each["logprobs"]) == len(each["token_ids"]) for each in shown["choices"])

    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "def add(a, b):", "id": "add"}\n\n{"prompt": "class A", "max_new_tokens": 3}\n')
    batch = ("generate", shipped, "--prompts", prompts, "--out", out, "--max-new-tokens", "12", "--dtype", "float32")
    done_file = command(*batch)
    assert done_file.status == 0, done_file.err
    assert "2 results added; 2 in all" in done_file.err
    lines = {line["index"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert lines[0]["text"] + "\n" == done.out
    assert (lines[0]["id"], len(lines[1]["choices"][0]["token_ids"])) == ("add", 3)
    before = out.read_bytes()
    assert "all 2 results are there already" in command(*batch).err
    assert out.read_bytes() == before
    changed = command(*batch, "--temperature", "1")
    assert changed.status == 2
    assert "sampling was" in changed.err
    prompts.write_text('{"prompt": [999999]}\n')
    wrong = command("generate", shipped, "--prompts", prompts, "--out", tmp_path / "new.jsonl")
    assert wrong.status == 2
    assert "prompts.jsonl:1: prompt: tokens below" in wrong.err
    assert not (tmp_path / "new.jsonl").exists()
