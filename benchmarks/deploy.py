"""One model in every engine: bytes, memory, first token and tokens per second of a source and its folds.

    python benchmarks/deploy.py --model SMOLLM2_FOLDER --llama PEER/bin/python --work FOLDER \\
        --write docs/results/deploy.md

Each engine runs in a process of its own with two threads; one runs at a time, in turn. A second run with the same
`--work` goes on where the first was interrupted, and `--page-only` makes the page anew. The environment of llama.cpp:

    python -m venv PEER && PEER/bin/pip install xllamacpp gguf numpy
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import deploy_page
import torch
from contest import BUSY, Competitor, ContenderFailed, compete
from model import SHAPES
from page import commit, run_facts
from random_source import make_source
from transformers.utils import logging

import refold
from refold.conversion.convert import ConvertOptions
from refold.studies.workload import Prompts

PEERS = Path(__file__).with_name("peers")
VARIANTS: dict[str, dict[str, Any]] = {
    "source": {},
    "strict, 2 loops": {"fold": {"loops": 2, "uneven": "drop"}},
    "strict, 3 loops": {"fold": {"loops": 3, "uneven": "drop"}},
    "pruned to half": {"drop": {"block": {"share": 0.5}}},
    "low rank, 67%": {"factor": {"parameters": 0.67, "weight": "none"}},
}
FORMATS = ("bfloat16", "int8", "int4")
GGUF_TYPES = {"bfloat16": None, "int8": "q8_0", "int4": "q4_0"}
CACHES = {"bfloat16": "BF16", "int8": "F16", "int4": "F16"}
PROMPT, CONTEXT, SLOTS = 32, 256, 8
CASES = {"first": (1, 128, 1), "b1": (1, PROMPT, 32), "b8": (8, PROMPT, 16)}
"""Rows, prompt tokens and new tokens of each case."""


@dataclass(frozen=True)
class Runner:
    """One engine with one file.

    Attributes:
        variant: Name of the fold.
        engine: Name of the engine.
        form: Name of the format of weights.
        path: File or folder that the engine loads.
    """

    variant: str
    engine: str
    form: str
    path: Path

    @property
    def name(self) -> str:
        """Name in the results."""
        return f"{self.variant} | {self.engine} | {self.form}"

    def command(self, options: argparse.Namespace) -> list[str]:
        """Returns the command of its process."""
        threads = str(options.threads)
        if self.engine == "llama.cpp":
            numbers = [CACHES[self.form], threads, str(SLOTS), str(CONTEXT)]
            return [str(options.llama), str(PEERS / "llama.py"), str(self.path), *numbers]
        if self.engine == "ONNX Runtime":
            return [sys.executable, str(PEERS / "onnx_loop.py"), str(self.path), threads]
        spec: dict[str, Any] = {"model": str(self.path), "threads": options.threads}
        if self.engine == "refold":
            settings = {"weights": self.form, "threads": options.threads, "share_prefixes": False, "max_rows": SLOTS}
            spec |= {"kind": "engine", "settings": settings}
        else:
            spec |= {"kind": "generate", "dtype": "float32" if self.form == "float32" else "bfloat16"}
        return [sys.executable, str(PEERS / "own.py"), json.dumps(spec)]


def main() -> int:
    options = read_options()
    logging.disable_progress_bar()
    options.work.mkdir(parents=True, exist_ok=True)
    facts = options.work / "facts.json"
    if not options.page_only:
        if not facts.exists():
            facts.write_text(json.dumps(run_facts(options.seed, os.getloadavg()[0])))
        made = {base: make_base(options, base, folder) for base, folder in bases(options).items()}
        # Contests that the targets are about come first.
        for variants in (("source",), tuple(VARIANTS)):
            for base, (runners, vocabulary) in made.items():
                measure(
                    options, f"{base}@llama.cpp", [each for each in runners if each.engine == "llama.cpp"], vocabulary
                )
                for variant in variants if base != options.shape else ("source",):
                    measure(
                        options, f"{base}@{variant}", [each for each in runners if each.variant == variant], vocabulary
                    )
    return deploy_page.write(options.work, json.loads(facts.read_text()), options.seed, options.write)


def read_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("deploy-run"), help="folder of models and results")
    parser.add_argument("--model", type=Path, help="folder of a real model; the shape is measured always")
    parser.add_argument("--llama", type=Path, help="interpreter with xllamacpp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every engine")
    parser.add_argument("--wait", default="ACTIVE", help="OMP_WAIT_POLICY of contenders; PASSIVE on a busy machine")
    parser.add_argument("--shape", choices=SHAPES, default="88M")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--page-only", action="store_true", help="measure nothing; make the page of --work")
    parser.add_argument("--write", type=Path, help="results page to write; the JSON goes beside it")
    return parser.parse_args()


def bases(options: argparse.Namespace) -> dict[str, Path]:
    """Returns the models by name; the shape with random weights is made where it is missing."""
    shape = options.work / options.shape
    if not (shape / "config.json").exists():
        make_source(shape, SHAPES[options.shape], options.seed, CONTEXT, "bfloat16")
    return {**({} if options.model is None else {options.model.name: options.model}), options.shape: shape}


def make_base(options: argparse.Namespace, base: str, source: Path) -> tuple[list[Runner], int]:
    """Writes all files of a model and their sizes; returns what engines shall run, and the size of the vocabulary."""
    runners = [
        runner
        for variant, recipe in VARIANTS.items()
        for runner in make_files(options, options.work / base, source, variant, recipe)
    ]
    sizes = {each.name: weight_bytes(each.path) for each in runners}
    (options.work / f"{base}.sizes.json").write_text(json.dumps(sizes))
    return runners, json.loads((source / "config.json").read_text())["vocab_size"]


def make_files(
    options: argparse.Namespace, work: Path, source: Path, variant: str, recipe: dict[str, Any]
) -> Iterator[Runner]:
    """Writes a fold and its exports where they are missing; yields what engines shall run."""
    stem = variant.replace(",", "").replace("%", "").replace(" ", "-")
    folder = work / stem
    if not folder.exists():
        refold.convert(source, folder, recipe, options=ConvertOptions(allow_larger=True))
    yield Runner(variant, "generate", "bfloat16", folder)
    yield Runner(variant, "refold", "bfloat16", folder)
    if variant == "source":
        yield Runner(variant, "generate", "float32", folder)
        yield Runner(variant, "refold", "float32", folder)
    for form in ("int8", "int4"):
        rounded = work / f"{stem}-{form}"
        if not rounded.exists():
            refold.quantise(folder, rounded, form)
        yield Runner(variant, "generate", form, rounded)
        yield Runner(variant, "refold", form, rounded)
    for form in FORMATS if options.llama else ():
        file = work / f"{stem}-{form}.gguf"
        if not file.exists():
            refold.export(folder, file, "gguf", dtype="bfloat16", quantise=GGUF_TYPES[form])
        yield Runner(variant, "llama.cpp", form, file)
    for form in ("float32", "int8", "int4"):
        graph = work / f"{stem}-{form}-onnx"
        if not graph.exists():
            refold.export(folder, graph, "onnx", dtype="float32", quantise=None if form == "float32" else form)
        yield Runner(variant, "ONNX Runtime", form, graph)


def weight_bytes(path: Path) -> int:
    """Returns the bytes of the weights in a file or folder."""
    endings = (".safetensors", ".gguf", ".onnx", ".onnx_data", ".data")
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.name.endswith(endings)]
    return sum(each.stat().st_size for each in files)


def measure(options: argparse.Namespace, part: str, runners: Sequence[Runner], vocabulary: int) -> None:
    """Measures the cases of a contest that have no result yet."""
    missing = [name for name in options.cases if not (options.work / f"{part}@{name}.json").exists()]
    if not missing or not runners:
        return
    prompts = Prompts(options.seed, vocabulary)
    competitors = started(options, runners)
    try:
        for name in missing:
            rows, length, new = CASES[name]
            given = [list(prompts.take(length)) for _ in range(rows)]
            begun = time.perf_counter()
            case = compete(competitors, {"prompts": given, "new": [new] * rows, "rows": rows}, options.rounds)
            case.commit = commit()
            case.save(options.work / f"{part}@{name}.json")
            busy = f"; other processes took {case.others:.0%}: quote no times" if case.others > BUSY else ""
            print(f"{part} {name}: {time.perf_counter() - begun:.0f} s{busy}", file=sys.stderr, flush=True)
    finally:
        for each in competitors:
            each.end()


def started(options: argparse.Namespace, runners: Sequence[Runner]) -> list[Competitor]:
    """Starts all processes; one that does not start is told and left out."""
    logs = options.work / "logs"
    logs.mkdir(exist_ok=True)
    waits = {"OMP_WAIT_POLICY": options.wait, "OMP_NUM_THREADS": str(options.threads)}
    ready = []
    for index, runner in enumerate(runners):
        each = Competitor(runner.name, runner.command(options), logs / f"{index}.log", waits)
        try:
            each.begin()
        except ContenderFailed as error:
            print(f"not measured: {error}", file=sys.stderr, flush=True)
            each.end()
            continue
        ready.append(each)
    return ready


if __name__ == "__main__":
    sys.exit(main())
