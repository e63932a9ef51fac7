"""The engine beside transformers, llama.cpp and CTranslate2: tokens per second and memory, with exits and drafts.

    python benchmarks/engine.py --llama PEER/bin/python --ctranslate PEER/bin/python \\
        --exits FOLDER [FOLDER ...] --data HELD_OUT_TEXT --work FOLDER --write docs/results/engine.md

Every contender has a process of its own and two threads; one runs at a time, in turn. A second run with the same
`--work` goes on where the first was interrupted, and `--page-only` makes the page anew. An environment for a peer:

    python -m venv PEER && PEER/bin/pip install xllamacpp
    python -m venv PEER && PEER/bin/pip install ctranslate2 numpy safetensors
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import engine_page
import torch
from contest import BUSY, Case, Competitor, ContenderFailed, compete
from engine_contenders import FORMATS, Entry, exit_entries, shape_entries
from model import SHAPES
from page import commit, run_facts
from random_source import make_source
from transformers.utils import logging

from refold.conversion.convert import ConvertOptions, convert
from refold.data.corpus import open_text
from refold.data.tokens import tokenise
from refold.exporting.export import export
from refold.modeling.load import load_tokenizer
from refold.studies.workload import Prompts, Workload, equal_lengths, mixed_lengths

PEERS = Path(__file__).with_name("peers")
PROMPT, NEW = 32, 32
REAL_PROMPT, REAL_NEW = 64, 64
CONTEXT = 256
"""Positions of the shape, and tokens that a slot of llama.cpp holds."""
SLOTS = 32
TEXT_TOKENS = 200_000
"""Tokens of held-out text that prompts are cut from."""
MACHINE = Entry("machine", "machine")
GGUF_NUMBERS: dict[str, dict[str, Any]] = {
    "F32": {"dtype": "float32"},
    "BF16": {"dtype": "bfloat16"},
    "Q8_0": {"quantise": "q8_0"},
    "Q4_0": {"quantise": "q4_0"},
}
FOLDS: dict[str, Any] = {
    "strict": {"fold": {"loops": 2}},
    "sequence": {"fold": {"loops": 2, "pattern": "sequence"}},
    "relaxed": {"fold": {"loops": 2, "init": "average"}, "relax": {"rank": 64, "init": "svd"}},
}


def main() -> int:
    options = read_options()
    logging.disable_progress_bar()
    options.work.mkdir(parents=True, exist_ok=True)
    facts_file = options.work / "facts.json"
    if not options.page_only:
        if not facts_file.exists():
            facts_file.write_text(json.dumps(run_facts(options.seed, os.getloadavg()[0])))
        measure(options)
    results = engine_page.Results.read(options.work, json.loads(facts_file.read_text()))
    return engine_page.write(results, options.seed, options.write)


def read_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("engine-run"), help="folder of models and results")
    parser.add_argument("--llama", type=Path, help="interpreter with xllamacpp")
    parser.add_argument("--ctranslate", type=Path, help="interpreter with ctranslate2")
    parser.add_argument("--exits", type=Path, nargs="*", default=[], help="healed models with exits")
    parser.add_argument("--data", type=Path, help="held-out text for prompts of the healed models")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every contender")
    parser.add_argument("--wait", default="ACTIVE", help="OMP_WAIT_POLICY of contenders; PASSIVE on a busy machine")
    parser.add_argument("--only", help="only contenders whose name holds this")
    parser.add_argument("--cases", nargs="+", default=["b1", "b8", "b32", "m8", "m32"])
    parser.add_argument("--parts", nargs="+", choices=("shape", "exits"), default=["shape", "exits"])
    parser.add_argument("--shape", choices=SHAPES, default="88M")
    parser.add_argument("--rules", type=Path, nargs="*", default=[], help="further files of `refold calibrate`")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[], help="of the gate, uncalibrated")
    parser.add_argument("--page-only", action="store_true", help="measure nothing; make the page of --work")
    parser.add_argument("--write", type=Path, help="results page to write; the JSON goes beside it")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds: at least 2 are required, because quartiles are shown (got {options.rounds})")
    return options


def measure(options: argparse.Namespace) -> None:
    """Measures all that the work folder lacks."""
    begun = time.perf_counter()
    make_models(options)
    if "shape" in options.parts:
        prompts = Prompts(options.seed, SHAPES[options.shape]["vocab_size"])
        entries = [each for each in shape_entries(options.work, options) if _wanted(each, options)]
        run_part(options, "shape", entries, workloads(prompts, PROMPT, NEW))
    for folder in options.exits if "exits" in options.parts else ():
        prompts = Prompts(options.seed, 0, _read_text(folder, options.data))
        cases = {name: work for name, work in workloads(prompts, REAL_PROMPT, REAL_NEW).items() if name[0] == "b"}
        entries = [each for each in exit_entries(folder, options) if _wanted(each, options)]
        run_part(options, f"exits-{folder.name}", entries, cases)
    print(f"measured in {time.perf_counter() - begun:.0f} s", file=sys.stderr)


def workloads(prompts: Prompts, prompt_tokens: int, num_new: int) -> dict[str, Workload]:
    """Returns the workloads of a part by name: equal lengths (`b`) and mixed ones (`m`) with the rows."""
    equal = {f"b{rows}": equal_lengths(prompts, rows, prompt_tokens, num_new, rows) for rows in (1, 8, 32)}
    counts = {8: 20, 32: 64}
    mixed = {f"m{rows}": mixed_lengths(prompts, count, prompt_tokens, num_new, rows) for rows, count in counts.items()}
    return equal | mixed


def run_part(options: argparse.Namespace, part: str, entries: Sequence[Entry], works: Mapping[str, Workload]) -> None:
    """Measures the cases of a part that have no result yet."""
    missing = [name for name in works if name in options.cases and not _result(options, part, name).exists()]
    if not missing or not entries:
        return
    with Started(options, [MACHINE, *entries]) as (machine, *competitors):
        by_name = {entry.name: entry for entry in entries}
        for name in missing:
            work = works[name]
            taking = [
                each for each in competitors if not by_name[each.name].cases or name[0] in by_name[each.name].cases
            ]
            request = {
                "prompts": [list(job.prompt) for job in work.jobs],
                "new": [job.num_new for job in work.jobs],
                "rows": work.rows,
            }
            begun = time.perf_counter()
            measure_machine(options, machine)
            case = compete(taking, request, options.rounds, how=lambda who, case: _wishes(by_name[who], case))
            if part.startswith("exits"):
                add_notes(case, taking, by_name)
            case.commit = commit()
            case.save(_result(options, part, name))
            busy = f"; other processes took {case.others:.0%}: quote no times" if case.others > BUSY else ""
            print(f"{part} {name}: {time.perf_counter() - begun:.0f} s{busy}", file=sys.stderr, flush=True)


def measure_machine(options: argparse.Namespace, machine: Competitor) -> None:
    """Measures the machine's rates and keeps the best ever seen: another process can only lower them."""
    path = options.work / "machine.json"
    best = json.loads(path.read_text()) if path.exists() else {}
    found = machine.ask({"prompts": [[0]], "new": [1], "rows": 1})["extra"]
    path.write_text(json.dumps({name: max(rate, best.get(name, 0.0)) for name, rate in found.items()}))


def _wishes(entry: Entry, case: Case) -> Mapping[str, Any]:
    """Returns the recorded exits for the contender that replays them."""
    if entry.replays is None:
        return {}
    if entry.replays not in case.answers:
        return {"depths": [[10**6] * count for count in case.request["new"]]}
    return {"depths": case.extra(entry.replays)["depths"]}


def add_notes(case: Case, competitors: Sequence[Competitor], entries: Mapping[str, Entry]) -> None:
    """Adds FLOPs and the share of tokens that differ from full depth, each predicted along the tokens of full depth."""
    full = next((each.name for each in competitors if entries[each.name].is_full), None)
    if full is None or full not in case.answers:
        return
    wanted = case.tokens(full)
    for competitor in competitors:
        name = competitor.name
        if entries[name].kind != "engine" or name not in case.answers:
            continue
        how = dict(_wishes(entries[name], case))
        try:
            flops = competitor.ask({**case.request, "how": {**how, "flops": True}})["extra"]["flops"]
            case.notes.setdefault("flops", {})[name] = flops
            if entries[name].takes_exits:
                predicted = competitor.ask({**case.request, "how": {**how, "forced": wanted}})["tokens"]
                pairs = [pair for rows in zip(predicted, wanted, strict=True) for pair in zip(*rows, strict=True)]
                case.notes.setdefault("differs", {})[name] = sum(one != other for one, other in pairs) / len(pairs)
        except ContenderFailed as error:
            print(f"{name}: no notes: {error}", file=sys.stderr, flush=True)


class Started:
    """Competitors that are ready, as a context; a contender that does not start is told and left out."""

    def __init__(self, options: argparse.Namespace, entries: Sequence[Entry]):
        logs = options.work / "logs"
        logs.mkdir(exist_ok=True)
        waits = {"OMP_WAIT_POLICY": options.wait, "OMP_NUM_THREADS": str(options.threads)}
        self.competitors = [
            Competitor(entry.name, command(entry, options), logs / f"{index}.log", waits)
            for index, entry in enumerate(entries)
        ]

    def __enter__(self) -> list[Competitor]:
        ready = []
        for each in self.competitors:
            begun = time.perf_counter()
            try:
                each.begin()
            except ContenderFailed as error:
                print(f"not measured: {error}", file=sys.stderr, flush=True)
                each.end()
                continue
            print(f"{each.name}: ready in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
            ready.append(each)
        return ready

    def __exit__(self, *_: object) -> None:
        for each in self.competitors:
            each.end()


def command(entry: Entry, options: argparse.Namespace) -> list[str]:
    """Returns the command of a contender."""
    threads = str(options.threads)
    if entry.kind == "llama":
        cache = entry.spec["cache"]
        file = str(options.work / f"{entry.spec['type']}.gguf")
        return [str(options.llama), str(PEERS / "llama.py"), file, cache, threads, str(SLOTS), str(CONTEXT)]
    if entry.kind == "ctranslate":
        folders = [str(options.work / "source"), str(options.work / "ctranslate")]
        return [str(options.ctranslate), str(PEERS / "ctranslate.py"), *folders, threads, entry.spec["type"]]
    spec = {"kind": entry.kind, "threads": options.threads, **entry.spec}
    return [sys.executable, str(PEERS / "own.py"), json.dumps(spec)]


def make_models(options: argparse.Namespace) -> None:
    """Makes the source, its folds and the files of the peers, where they are missing."""
    source = options.work / "source"
    if not (source / "config.json").exists():
        make_source(source, SHAPES[options.shape], options.seed, CONTEXT)
    for name, recipe in FOLDS.items():
        if not (options.work / name).exists():
            convert(source, options.work / name, recipe, options=ConvertOptions(allow_larger=True))
    for kind in FORMATS if options.llama else ():
        file = options.work / f"{kind}.gguf"
        if not file.exists():
            export(source, file, "gguf", **GGUF_NUMBERS[kind])


def _read_text(folder: Path, data: Path | None) -> list[int]:
    """Returns tokens of the beginning of the held-out text."""
    if data is None:
        raise SystemExit("engine: --data with held-out text is required for --exits")
    found = tokenise(open_text(str(data)), load_tokenizer(folder), budget=TEXT_TOKENS, seed=None)
    return found.tokens.tolist()


def _wanted(entry: Entry, options: argparse.Namespace) -> bool:
    if (entry.kind == "llama" and not options.llama) or (entry.kind == "ctranslate" and not options.ctranslate):
        return False
    return options.only is None or options.only in entry.name


def _result(options: argparse.Namespace, part: str, case: str) -> Path:
    return options.work / f"{part}-{case}.json"


if __name__ == "__main__":
    sys.exit(main())
