"""Rows of several adapters in one launch, beside rows of one and beside each adapter's rows by themselves.

    python benchmarks/engine_adapters.py --write docs/results/engine-adapters.md

A fold of random weights and four sets of random adapters; about three minutes of one core.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from page import Page, table
from random_source import make_source
from timing import Spread, Timings, interleave

from refold.conversion.convert import ConvertOptions, convert
from refold.engine.engine import Engine
from refold.engine.settings import EngineSettings
from refold.generation.sampling import Sampling
from refold.modeling.load import load_model

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
RANK, SETS, ROWS, PROMPT, NEW = 16, 4, 16, 16, 24
HOW = f"""A fold of {SHAPE["num_hidden_layers"]} layers in two loops, width {SHAPE["hidden_size"]}, LoRA of rank {RANK}
on every linear, random weights; {SETS} further sets of adapters. {ROWS} prompts of {PROMPT} tokens, {NEW} new tokens
each, greedy, prefill inside the clock.

`one`: all rows run with one set. `mixed`: each set has {ROWS // SETS} of the rows. `in turn`: the rows of one set after
the other, as models that are not served together would run. The three columns are new tokens per second, medians;
ratios are of speeds, taken within rounds, with quartiles.

`MB`: weights with the model's own adapters; `MB a set`: bytes that one further set adds. Beside integers the engine
also keeps weights in floats, for launches of many rows, and so for adapters too. `equal`: mixed rows gave the tokens of
the rows in turn. Random weights nearly tie often; with integers another number of rows takes another kernel, and then
another token may win."""
FORMS = ("float32", "bfloat16", "int8", "int4")


def make_folders(work: Path, seed: int) -> tuple[Path, list[Path]]:
    """Returns a fold, and folders that differ from it in their adapters alone."""
    make_source(work / "source", SHAPE, seed, 256)
    recipe = {"fold": {"loops": 2, "init": "average"}, "relax": {"rank": RANK}}
    convert(work / "source", work / "base", recipe, options=ConvertOptions(allow_larger=True))
    model: Any = load_model(work / "base", device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    folders = [work / f"set{number}" for number in range(SETS)]
    for folder in folders:
        for name, weight in model.named_parameters():
            if ".lora." in name:
                weight.data.copy_(0.02 * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(folder)
    return work / "base", folders


def measure(base: Path, folders: list[Path], form: str, seed: int, rounds: int) -> tuple[Timings, Engine, bool]:
    """Returns the timings of one form of weights, the engine, and whether mixed rows gave each adapter's tokens."""
    settings = EngineSettings(weights=form, max_rows=ROWS, max_context=64, share_prefixes=False)
    engine = Engine(base, settings, device="cpu")
    names = [folder.name for folder in folders]
    for name, folder in zip(names, folders, strict=True):
        engine.add_adapters(name, folder)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, SHAPE["vocab_size"], (ROWS, PROMPT), generator=generator).tolist()
    sampling = Sampling(max_new_tokens=NEW, ignore_eos=True)
    mixed = [names[index % SETS] for index in range(ROWS)]

    def in_turn() -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for name in names:
            own = [index for index in range(ROWS) if mixed[index] == name]
            results = engine.generate([prompts[index] for index in own], sampling, adapter=name)
            found |= {index: list(each.choices[0].token_ids) for index, each in zip(own, results, strict=True)}
        return [found[index] for index in range(ROWS)]

    def together(adapter: Any) -> list[list[int]]:
        results = engine.generate(prompts, sampling, adapter=adapter)
        return [list(each.choices[0].token_ids) for each in results]

    is_same = together(mixed) == in_turn()
    contenders = {"one": partial(together, names[0]), "mixed": partial(together, mixed), "in turn": in_turn}
    return interleave(contenders, rounds), engine, is_same


def told(spread: Spread, digits: int = 2) -> str:
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f} to {spread.high:.{digits}f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", nargs="*", default=list(FORMS), choices=FORMS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    page = Page("Rows of several adapters in one launch", given.seed)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        base, folders = make_folders(Path(work), given.seed)
        for form in given.weights:
            timings, engine, is_same = measure(base, folders, form, given.seed, given.rounds)
            per_second = {name: ROWS * NEW / timings.spread(name).median for name in timings.seconds}
            over_one = timings.ratio("one", "mixed")
            report = engine.statistics()
            rows.append(
                [
                    form,
                    *(f"{per_second[name]:.0f}" for name in ("one", "mixed", "in turn")),
                    told(over_one),
                    told(timings.ratio("in turn", "mixed")),
                    f"{(report.weight_bytes - report.adapter_bytes) / 1e6:.1f}",
                    f"{report.adapter_bytes / SETS / 1e6:.2f}",
                    "yes" if is_same else "no",
                ]
            )
            says = f"{form}: {ROWS} rows of {SETS} adapters at least 0.8 times as fast as {ROWS} rows of one"
            page.target(says, told(over_one), over_one.median >= 0.8)
    header = ["weights", "one", "mixed", "in turn", "mixed over one", "mixed over in turn", "MB", "MB a set", "equal"]
    page.section("Results", table(header, rows))
    page.section("How to read it", HOW)
    return page.finish(given.write)


if __name__ == "__main__":
    raise SystemExit(main())
