"""Contenders of the engine's benchmark."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refold.blueprint.schema import Blueprint
from refold.checkpoint.folded_tensors import read_blueprint

EXITS_NAME = "exits.json"
"""File of calibrated thresholds in a model folder."""
FORMATS = ("F32", "BF16", "Q8_0", "Q4_0")
MEMORY = 256 << 20
"""Bytes for keys, values and states of every engine of refold."""
ROWS = 32


@dataclass(frozen=True)
class Entry:
    """One contender.

    Attributes:
        name: Its name in tables.
        kind: `engine`, `generate`, `generate_batch`, `llama`, `ctranslate` or `machine`.
        spec: Settings of its process.
        weights: Dtype or bits of its weights, for comparisons at equal precision.
        cases: Letters of the cases it takes part in; empty: all.
        is_full: Whether others are compared with its tokens.
        takes_exits: Whether tokens may leave early.
        replays: Name of the contender whose exits it replays.
    """

    name: str
    kind: str
    spec: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    cases: str = ""
    is_full: bool = False
    takes_exits: bool = False
    replays: str | None = None


def shape_entries(work: Path, options: argparse.Namespace) -> list[Entry]:
    """Returns the contenders on the shape with random weights."""
    dtypes = ("float32", "bfloat16")
    source = str(work / "source")
    entries = [
        Entry(f"{kind}, {dtype}", kind, {"model": source, "dtype": dtype}, dtype)
        for kind in ("generate", "generate_batch")
        for dtype in dtypes
    ]
    widths = {"F32": "float32", "BF16": "bfloat16", "Q8_0": "int8", "Q4_0": "int4"}
    caches = {"F32": "F32", "BF16": "BF16"}
    entries += [
        Entry(
            f"llama.cpp, {kind}",
            "llama",
            {"type": kind, "cache": caches.get(kind, "F16")},
            widths[kind],
            "" if kind in caches else "b",
        )
        for kind in FORMATS
    ]
    entries += [
        Entry("CTranslate2, float32", "ctranslate", {"type": "float32"}, "float32"),
        Entry("CTranslate2, int8", "ctranslate", {"type": "int8"}, "int8", "b"),
    ]
    for weights in (*dtypes, "int8", "int4"):
        entries.append(_engine("source", source, weights, options, "" if weights in dtypes else "b"))
    for name in ("strict", "sequence", "relaxed"):
        entries.append(_engine(name, str(work / name), "bfloat16", options, "b"))
    for name in ("strict", "sequence"):
        entries.append(_engine(name, str(work / name), "int4", options, "b"))
    return entries


def _engine(name: str, folder: str, weights: str, options: argparse.Namespace, cases: str) -> Entry:
    return Entry(
        f"refold, {name}, {weights}",
        "engine",
        {"model": folder, "settings": _settings(weights, options)},
        weights,
        cases,
    )


def _settings(weights: str, options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    # Every round has the same prompts: shared prefixes would save their prefill from the second on.
    kept = {"max_rows": ROWS, "memory": MEMORY, "share_prefixes": False}
    return {"weights": weights, "threads": options.threads, **kept, **more}


FULL = "refold, full depth"
LOSSLESS, ALWAYS, LOOKUP = "refold, lossless drafts", "refold, lossless drafts, always", "refold, looked-up drafts"
DRAFTS = {LOSSLESS: {"source": "exit"}, ALWAYS: {"source": "exit", "adapt": False}, LOOKUP: {"source": "lookup"}}
"""Settings of drafting; without `adapt` every row drafts in every round, which tells the acceptance of the model."""
LIVE, REPLAY = "refold, exits live", "refold, exits replayed"


def exit_entries(folder: Path, options: argparse.Namespace) -> list[Entry]:
    """Returns the contenders on one healed model with exits, all in float32, so that lossless means equal tokens."""
    model = str(folder)
    plain = {"model": model, "settings": _settings("float32", options)}
    entries = [
        Entry("generate, full depth", "generate", {"model": model, "dtype": "float32"}, "float32"),
        Entry(FULL, "engine", plain, "float32", is_full=True),
    ]
    for rule, exits, policies in _rules(folder, options):
        for kv in policies:
            live = f"{LIVE}, {rule}, {kv}"
            spec = {"model": model, "settings": _settings("float32", options, kv=kv), "exits": exits}
            entries.append(Entry(live, "engine", spec, "float32", takes_exits=True))
            replay = {**spec, "exits": "replay"}
            name = f"{REPLAY}, {rule}, {kv}"
            entries.append(Entry(name, "engine", replay, "float32", takes_exits=True, replays=live))
    for name, drafts in DRAFTS.items():
        entries.append(Entry(name, "engine", {**plain, "drafts": drafts}, "float32"))
    return entries


def _rules(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Any, list[str]]]:
    """Yields the name of each rule, its form for the engine, and the policies to run it with."""
    for file in (folder / EXITS_NAME, *options.rules):
        if file.exists():
            content = json.loads(file.read_text())
            # A file that was calibrated for another model is not this folder's.
            if file.parent == folder or file.name.startswith(f"{folder.name}-"):
                yield f"{content['measure']} at {content['tolerance']:.0%}", str(file), [content["kv"]]
    depths = exit_depths(folder)
    for threshold in options.thresholds:
        rule = {"measure": "gate", "thresholds": dict.fromkeys(depths, threshold)}
        yield f"gate over {threshold:g}", rule, kv_policies(folder)


def exit_depths(folder: Path) -> list[int]:
    """Returns the numbers of depths before each exit."""
    return [index + 1 for index, depth in enumerate(_blueprint(folder).depths) if depth.exit is not None]


def kv_policies(folder: Path) -> list[str]:
    """Returns the policies for keys of skipped depths that suit a model."""
    from refold.blueprint.passes import last_writing_depth

    writes_later = last_writing_depth(_blueprint(folder)) >= exit_depths(folder)[0]
    return ["recompute", "propagate"] if writes_later else ["shared"]


def _blueprint(folder: Path) -> Blueprint:
    return read_blueprint(str(folder), json.loads((folder / "config.json").read_text()))
