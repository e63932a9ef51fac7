"""Arms of a study: each is trained at several learning rates, and then at the best rate for every seed.

Every run is one folder under `--work`. An existing run is not repeated, so an interrupted study continues.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from page import commit

from refold.evaluation.evaluate import evaluate
from refold.evaluation.reference import Reference
from refold.evaluation.result import Evaluation, read_evaluation
from refold.evaluation.settings import EvaluationSettings
from refold.fields import read_amount
from refold.healing.heal import heal
from refold.healing.run import HealOptions
from refold.recipe.heal import HealStage


def make_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Returns a parser for the common arguments of studies; `defaults` are the values that differ between studies."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--tokens", type=read_amount)
    parser.add_argument("--sweep-tokens", type=read_amount)
    parser.add_argument("--eval-tokens", type=read_amount)
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-tokens", type=read_amount)
    parser.add_argument("--dtype", help="evaluations compute in it (default: evaluate's)")
    parser.add_argument("--write", type=Path, help="page to write")
    parser.set_defaults(**defaults)
    return parser


def measure(model: Path, path: Path, given: argparse.Namespace) -> Evaluation:
    """Evaluates a model against the source, unless a result exists."""
    if not path.exists():
        settings = EvaluationSettings(context=given.context, max_tokens=given.eval_tokens, dtype=given.dtype)
        evaluate(model, given.held_out, settings, against=_reference(given.source, given.dtype)).write(path)
    return read_evaluation(path)


@cache
def _reference(source: str, dtype: str | None) -> Reference:
    return Reference(source, dtype=dtype)


class Run(NamedTuple):
    """The result of one training: its evaluation, and, if measured, held-out bits per byte by number of tokens."""

    found: Evaluation
    curve: list[tuple[int, float]]


class Chosen(NamedTuple):
    """All runs of an arm: by learning rate for the first seed, the best rate, and by seed at this rate."""

    sweep: dict[float, Evaluation]
    rate: float
    runs: dict[int, Run]


@dataclass(frozen=True)
class Arm:
    """One way to train a model.

    Attributes:
        start: The model before training.
        folder: Folder of the arm's runs.
        stages: Function from learning rate, seed and tokens to the healing stages.
        given: Arguments of the study.
        is_followed: Whether whole runs are evaluated during training. Such a study keeps figures but no weights.
    """

    start: Path
    folder: Path
    stages: Callable[[float, int, int], Sequence[HealStage]]
    given: argparse.Namespace
    is_followed: bool = False

    def choose(self) -> Chosen:
        given = self.given
        sweep = {rate: self.train(rate, given.seeds[0], given.sweep_tokens).found for rate in given.rates}
        best = min(sweep, key=lambda rate: sweep[rate].bits_per_byte)
        return Chosen(sweep, best, {seed: self.train(best, seed, given.tokens) for seed in given.seeds})

    def train(self, rate: float, seed: int, tokens: int) -> Run:
        """Trains and evaluates one run, unless its result exists."""
        name = f"lr{rate:g}-seed{seed}-{tokens}"
        out, result, curve = (self.folder / f"{name}{end}" for end in ("", ".json", ".curve.json"))
        if not (curve if self.is_followed else result).exists():
            started, given = time.perf_counter(), self.given
            if not out.exists():
                watched = given.held_out if self.is_followed and tokens == given.tokens else None
                stages = self.stages(rate, seed, tokens)
                heal(self.start, out, given.train, stages, held_out=watched, options=HealOptions(quiet=True))
            found = measure(out, result, given)
            if self.is_followed:
                steps = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
                points = [(step["tokens"], step["held_out"]) for step in steps if step.get("held_out") is not None]
                curve.write_text(json.dumps(points) + "\n")
                shutil.rmtree(out)
            took = time.perf_counter() - started
            print(f"{self.folder.name} {name}: {found.bits_per_byte:.4f} bits per byte, {took:.0f} s", flush=True)
        return Run(read_evaluation(result), json.loads(curve.read_text()) if self.is_followed else [])


def arm_folder(work: Path, name: str) -> Path:
    return work / name.replace(",", "").replace("'", "").replace(" ", "-")


def machine() -> dict[str, str]:
    """Returns a description of the machine of a study."""
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "commit": commit(),
    }


def command_lines() -> list[str]:
    """Returns the end of a page: machine and command lines."""
    told = machine()
    command = shlex.join(argument if "/" not in argument else Path(argument).name for argument in sys.argv[1:])
    return [
        f"Machine: {told['machine']}; Python {told['python']}; commit {told['commit']}. Command:",
        "",
        f"    python benchmarks/{Path(sys.argv[0]).name} {command}",
        "",
    ]
