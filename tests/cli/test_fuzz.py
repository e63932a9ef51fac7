"""Damaged and hostile recipes, overrides and options give one line and an exit status, no traceback and no hang."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import refold
from refold.recipe.load import built_in_recipes

MAX_SECONDS = 20
"""Of processor time: a machine that does other things is no fault."""
MAX_PRINTED = 50_000
SLICE, WHOLE = 120, 2000
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 10**18, -(10**18), 2**63, 10**30, 0.5, -0.5, 1.5, 1e300, float("inf"),
    float("nan"), "", "x", "all", "none", "full", "mlp", "mixer", "q_proj", "stepwise", "average", "20M", "1e99", "-3",
    "9" * 200, "a" * 5000, "\u0000", "\u2028", "\U0001f600", "déjà", "../../etc/passwd", "*", "[", "${x}", "{{ 1/0 }}",
    [], [[]], [0], [-1], [1, 1], [10**18], list(range(200)), {}, {"x": 1}, {"type": []}, {"type": "retention"},
    {"count": 1}, {"count": 10**12}, {"share": 2}, {"parameters": 0.1}, {"parameters": 1e-12}, {"energy": 0.5},
    {"mlp": 4}, {"layers": [0, 1]}, {"back": 1}, {1: 2}, {None: None}, [{"type": ["mamba"]}], {"protocol": {"a": 1}},
)  # fmt: skip
"""Values that are put in the place of any value of a recipe."""
KEYS = (
    "fold", "loops", "pattern", "init", "tie", "align", "scale", "prelude", "coda", "uneven", "relax", "rank", "type",
    "at", "vectors", "weight", "svd", "length", "factor", "parameters", "share", "split", "calibration", "tokens",
    "context", "order", "drop", "block", "attention", "mlp", "sublayers", "count", "layers", "by", "mixers", "depths",
    "except", "transfer", "heads", "key_heads", "head_dim", "state_size", "share_kv", "from", "depth", "exits", "norm",
    "head_rank", "gate", "ignore_tensors", "name", "reason", "heal", "protocol", "objective", "learning_rate", "warmup",
    "schedule", "thaw", "freeze", "seed", "weights", "description", "0", "1", "9" * 30,
)  # fmt: skip
TEXTS = (
    "? [a]\n: b\n", "seed: 2024-13-45\n", "a: !!int abc\n", "a: 0x_\n", "a: " + "9" * 5000, "[" * 3000, "{a: " * 3000,
    "a: &a [*a]\n", "a: !!timestamp x\n", "&a", "*a", "<<: 1", "!!python/object:os.system {}", "\ufeff", "\x07", "\t",
    '"\\ud800"', '"\\UFFFFFFFF"', "---\n---\n", "%YAML 9.9\n---\n", "- ", ": ", "{energy:0.5}", "!!bool maybe", "|\n",
    "a: &a [1,1]\nb: &b [" + "*a," * 99 + "]\nc: &c [" + "*b," * 99 + "]\nd: [" + "*c," * 99 + "]\n",
)  # fmt: skip
"""Pieces of YAML that are put anywhere into a recipe's text."""

Command = Callable[..., Any]


def _mutate(data: Any, draw: random.Random, chance: float = 0.15) -> Any:
    """Returns a recipe with some of its values, keys and entries exchanged, dropped or added."""
    if draw.random() < chance:
        return draw.choice(NASTY)
    if isinstance(data, dict):
        mutated = {}
        for key, value in data.items():
            if draw.random() < 0.05:
                continue
            mutated[draw.choice(KEYS) if draw.random() < 0.05 else key] = _mutate(value, draw, chance)
        while draw.random() < 0.3:
            mutated[draw.choice(KEYS)] = _mutate(draw.choice(NASTY), draw, chance)
        return mutated
    if isinstance(data, list):
        return [_mutate(value, draw, chance) for value in data for _ in range(draw.choice((0, 1, 1, 1, 1, 2)))]
    return data


def _recipe_texts(draw: random.Random) -> Iterator[str]:
    import refold.recipes

    folder = Path(next(iter(refold.recipes.__path__)))
    bases = [yaml.safe_load((folder / f"{name}.yaml").read_text("utf-8")) for name in built_in_recipes()]
    while True:
        text = yaml.safe_dump(_mutate(draw.choice(bases), draw), allow_unicode=draw.random() < 0.5)
        if draw.random() < 0.3:
            place = draw.randrange(len(text) + 1)
            text = text[:place] + draw.choice(TEXTS) + text[place + draw.choice((0, 0, 1, 5)) :]
        yield text


def _overrides(draw: random.Random) -> Iterator[list[str]]:
    while True:
        given: list[str] = []
        for _ in range(draw.randint(1, 3)):
            path = ".".join(draw.choices(KEYS, k=draw.choice((1, 1, 2, 2, 2, 3, 60))))
            value = draw.choice(TEXTS) if draw.random() < 0.2 else yaml.safe_dump(draw.choice(NASTY)).strip()
            given += ["--set", draw.choice((f"{path}={value}", f"{path}={value}", path, f"={value}", value))]
        yield given


def _number(draw: random.Random) -> str:
    return draw.choice(
        ("-5", "0", "1", "3", "x", "", "1e9", "1e999999999", "nan", "inf", "9" * 5000, "2k", "½", "٣", " 4 ")
    )


def _command_lines(draw: random.Random, places: dict[str, str]) -> Iterator[list[str]]:
    """Command lines of all sub-commands with right and wrong values; `places` are paths of several kinds."""
    place = list(places.values())
    numbers = {
        "analyse": ("--tokens", "--context", "--seed"),
        "plan": ("--context",),
        "heal": ("--tokens",),
        "evaluate": ("--context", "--stride", "--max-tokens", "--batch-size"),
        "run": ("--tokens", "--eval-tokens"),
        "generate": (
            *("--max-new-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--seed", "--exit-depth", "-n"),
            *("--repetition-penalty", "--presence-penalty", "--frequency-penalty", "--logit-bias", "--logprobs"),
        ),
        "convert": (), "recipes": (), "inspect": (), "export": (), "demo": ("--heal-tokens",),
    }  # fmt: skip
    words = {
        "--device": ("cpu", "cuda", "mps", "nonsense", "cpu:9", ""),
        "--dtype": ("float32", "float64", "int8", "x", ""),
        "--quantise": ("int8", "int3", ""),
        "--to": ("dense", "gguf", ""),
        "--recipe": ("relaxed", "relaxt", "", "joint", *place),
        "--set": ("fold.loops=2", "fold.loops=x", "", "=", "a.b.c"),
        "--prompt": ("def f", "", "\udce9", "x" * 3000),
        "--measurements": place, "--against": place, "--out": place, "--state": place, "--save-state": place,
        "--prompts": place,
        "--calibration": place, "--held-out": place, "--teacher": place, "--adapters": place, "--data": place,
    }  # fmt: skip
    takes = {
        "analyse": ("--data", "--out", "--device"),
        "plan": ("--recipe", "--set", "--measurements"),
        "convert": ("--recipe", "--set", "--calibration", "--measurements", "--device"),
        "heal": ("--data", "--recipe", "--set", "--teacher", "--held-out", "--device"),
        "evaluate": ("--data", "--against", "--out", "--dtype", "--device", "--quantise"),
        "run": ("--data", "--recipe", "--set", "--held-out", "--device"),
        "generate": ("--prompt", "--state", "--save-state", "--adapters", "--dtype", "--device", "--prompts", "--out"),
        "export": ("--to", "--dtype"),
        "recipes": (), "inspect": (), "demo": ("--out",),
    }  # fmt: skip
    for_training = ("heal", "run", "demo")
    while True:
        name = draw.choice(tuple(numbers))
        line = [name, *draw.choices(place, k=draw.choice((0, 1, 1, 1, 2)))]
        for option in takes[name]:
            if draw.random() < (0.9 if option in ("--prompt", "--data") else 0.3):
                line += [option, draw.choice(words[option])]
        for option in numbers[name]:
            if draw.random() < 0.3:
                line += [option, _number(draw)]
        if name in for_training:
            # What is right would train for minutes: something of it is always wrong.
            line += ["--tokens" if name != "demo" else "--heal-tokens", draw.choice(("-5", "x", "1e99"))]
        if draw.random() < 0.1:
            line.insert(
                draw.randrange(len(line) + 1), draw.choice(("--nope", "--json", "--overwrite", "--", "-", "", "-x"))
            )
        yield line


def _check(command: Command, line: list[str], shown: object) -> None:
    began = time.process_time()
    done = command(*line)
    seconds = time.process_time() - began
    told = f"{shown!r}\n{done.err[-2000:]}"
    assert done.status in (0, 1, 2), told
    assert "Traceback" not in done.err, told
    assert "internal error" not in done.err, told
    assert done.status == 0 or done.err, told
    assert seconds < MAX_SECONDS, f"{seconds:.0f} s: {told}"
    assert len(done.out) + len(done.err) < MAX_PRINTED, f"{len(done.out)} and {len(done.err)} characters: {told}"


COUNTS = [
    pytest.param(SLICE, 0, id="slice"),
    pytest.param(WHOLE, 1, id="whole", marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
]


@pytest.mark.parametrize(("count", "seed"), COUNTS)
def test_recipes(count: int, seed: int, command: Command, shipped: Path, tmp_path: Path) -> None:
    texts, file = _recipe_texts(random.Random(seed)), tmp_path / "recipe.yaml"
    for _, text in zip(range(count), texts, strict=False):
        file.write_text(text, "utf-8", "surrogatepass")
        _check(command, ["plan", str(shipped), "--recipe", str(file), "--allow-larger"], text)


@pytest.mark.parametrize(("count", "seed"), COUNTS)
def test_overrides(count: int, seed: int, command: Command, shipped: Path) -> None:
    draw = random.Random(seed)
    for _, given in zip(range(count), _overrides(draw), strict=False):
        recipe = ["--recipe", draw.choice(tuple(built_in_recipes()))] if draw.random() < 0.6 else []
        _check(command, ["plan", str(shipped), *recipe, *given], given)


@pytest.mark.parametrize(("count", "seed"), COUNTS)
def test_options(
    count: int, seed: int, command: Command, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in ("analyse", "convert", "evaluate", "export", "generate", "heal"):
        getattr(refold, stage)  # Importing torch counts for nobody.
    text, pdf, thesis = tmp_path / "text.txt", tmp_path / "paper.pdf", tmp_path / "thesis"
    text.write_text("def f():\n    return 1\n" * 50)
    pdf.write_bytes(b"%PDF-1.7\x00\xff")
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("mine")
    places = {
        "shipped": str(shipped), "nowhere": str(tmp_path / "nowhere"), "text": str(text), "pdf": str(pdf),
        "folder": str(thesis), "empty": "", "null": "/dev/null", "below a file": str(text / "x"), "dot": ".",
        "bytes": "\udce9", "long": "a" * 5000,
    }  # fmt: skip
    for _, line in zip(range(count), _command_lines(random.Random(seed), places), strict=False):
        _check(command, line, line)
        assert (thesis / "thesis.txt").read_text() == "mine", line
        assert text.read_text().startswith("def f"), line
