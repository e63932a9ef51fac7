"""The loss by rounding: `refold quantise`, with and without error feedback, beside llama.cpp's types, at their bytes.

    python benchmarks/rounding.py --model FOLDER [FOLDER ...] --text NAME=HELD_OUT [NAME=HELD_OUT ...] \\
        --calibration TEXT [TEXT ...] --work FOLDER --write docs/results/rounding.md

Every model is rounded, evaluated on every text, and compared with its own floats. A second run with the same `--work`
goes on where the first was interrupted.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from page import Page, run_facts, table

import refold

MB = 1e6
GGUF_TYPES = ("q8_0", "q5_1", "q4_1", "q4_0")
NEAR = 0.005
"""Nats per token that count as equal."""
PAIRS = {"int8": "q8_0", "int4": "q4_0"}


def main() -> int:
    options = read_options()
    options.work.mkdir(parents=True, exist_ok=True)
    texts = dict(each.split("=", 1) for each in options.text)
    page = Page("The loss by rounding", options.seed, run_facts(options.seed, 0.0))
    results = {model.name: measure(options, model, texts) for model in options.model}
    for name, rows in results.items():
        page.section(name, _table(rows, list(texts)))
        _targets(page, name, rows)
    if options.write is not None:
        options.write.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    return min(1, page.finish(options.write))


def read_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="sources or folded models")
    parser.add_argument("--text", nargs="+", required=True, metavar="NAME=FILE", help="held-out texts")
    parser.add_argument("--calibration", nargs="+", required=True, help="text for the error feedback")
    parser.add_argument("--tokens", type=int, default=20_000, help="held-out tokens of each text")
    parser.add_argument("--calibration-tokens", type=int, default=64_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("rounding-run"))
    parser.add_argument("--write", type=Path, help="results page to write; the JSON goes beside it")
    return parser.parse_args()


def measure(options: argparse.Namespace, model: Path, texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Returns, for every rounding of a model, its bytes and its nats per token on every text."""
    work = options.work / model.name
    work.mkdir(exist_ok=True)
    found = {}
    for name, make in _roundings(options, model, work).items():
        file = work / f"{name.replace(' ', '-').replace(',', '')}.json"
        if not file.exists():
            place = make()
            scores = {kind: _score(place, model, text, options.tokens) for kind, text in texts.items()}
            file.write_text(json.dumps({"bytes": _bytes(place), "scores": scores}))
        found[name] = json.loads(file.read_text())
        print(model.name, name, found[name], file=sys.stderr, flush=True)
    return found


def _roundings(options: argparse.Namespace, model: Path, work: Path) -> dict[str, Callable[[], Path]]:
    def rounded(to: str, data: list[str] | None) -> Path:
        out = work / f"{to}-{'plain' if data is None else 'feedback'}"
        if not out.exists():
            refold.quantise(model, out, to, data=data, tokens=options.calibration_tokens)
        return out

    def gguf(kind: str) -> Path:
        out = work / f"{kind}.gguf"
        if not out.exists():
            # Embedding and head have 8 bits in folders of `refold quantise` too.
            refold.export(model, out, "gguf", quantise=kind, keep={"embeddings": "q8_0", "head": "q8_0"})
        return out

    found: dict[str, Callable[[], Path]] = {}
    for to in ("int8", "int4"):
        found[f"{to}, plain"] = lambda to=to: rounded(to, None)
        found[f"{to}, error feedback"] = lambda to=to: rounded(to, options.calibration)
    return found | {kind: lambda kind=kind: gguf(kind) for kind in GGUF_TYPES}


def _score(place: Path, model: Path, text: str, tokens: int) -> dict[str, float]:
    """Returns the loss over the floats, and the divergence KL(floats || rounded), in nats per token."""
    settings = refold.EvaluationSettings(max_tokens=tokens, dtype="float32")
    found = refold.evaluate(place, [text], against=model, settings=settings)
    lost = math.log(found.perplexity) - math.log(found.against.perplexity)
    return {"lost": lost, "kl": found.against.kl}


def _bytes(place: Path) -> int:
    files = [place] if place.is_file() else place.glob("*.safetensors")
    return sum(each.stat().st_size for each in files)


def _table(rows: Mapping[str, Mapping[str, Any]], kinds: list[str]) -> str:
    lines = []
    for name, row in rows.items():
        scores = [row["scores"][kind] for kind in kinds]
        shown = [text for each in scores for text in (f"{each['kl']:.4f}", f"{each['lost']:+.4f}")]
        lines.append([name, f"{row['bytes'] / MB:.1f}", *shown])
    columns = [f"{what}, {kind}" for kind in kinds for what in ("divergence", "loss")]
    return table(["weights", "MB", *columns], lines)


def _targets(page: Page, model: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    for kind in rows["q4_0"]["scores"]:
        found = {name: row["scores"][kind]["kl"] for name, row in rows.items()}
        for own, other in PAIRS.items():
            best = min(found[f"{own}, plain"], found[f"{own}, error feedback"])
            says = f"{model}, {kind}: divergence of {own} at most {NEAR} nats over that of {other}"
            page.target(says, f"{best - found[other]:+.4f}", best - found[other] <= NEAR)
        plain, feedback = found["int4, plain"], found["int4, error feedback"]
        says = f"{model}, {kind}: feedback at least halves the divergence of int4"
        page.target(says, f"{plain:.4f} to {feedback:.4f}", feedback <= plain / 2)


if __name__ == "__main__":
    sys.exit(main())
