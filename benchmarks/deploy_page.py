"""The results page of the deployment benchmark, made from its JSON: tables, and every target with its figure."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from contest import BUSY, Case
from page import Page, table

MB = 1e6
ENGINES = ("generate", "refold", "llama.cpp", "ONNX Runtime")
FORMATS = ("float32", "bfloat16", "int8", "int4")
DOCUMENTED = {
    "generate": "transformers `generate`; int8 and int4 are folders of `refold quantise`",
    "refold": "`refold.Engine`",
    "llama.cpp": "`gguf` exports: strict folds and pruned models with their saving kept; int8 is Q8_0, int4 is Q4_0",
    "ONNX Runtime": "`onnx` exports in a plain loop in Python, activations in float32",
}


class Found:
    """All results of one work folder.

    Args:
        work: The folder.
    """

    def __init__(self, work: Path):
        self.sizes: dict[str, dict[str, int]] = {}
        for file in sorted(work.glob("*.sizes.json")):
            self.sizes[file.name.removesuffix(".sizes.json")] = json.loads(file.read_text())
        self.cases: dict[tuple[str, str, str], Case] = {}
        for file in sorted(work.glob("*@*@*.json")):
            base, part, case = file.stem.split("@")
            self.cases[base, part, case] = Case.read(file)

    def bases(self) -> list[str]:
        """Names of the measured models, real ones first."""
        return sorted(self.sizes, key=lambda name: name.endswith("M"))

    def rate(self, base: str, part: str, case: str, name: str) -> float | None:
        """Returns new tokens per second, the median of all rounds; None: not measured."""
        found = self.cases.get((base, part, case))
        if found is None or name not in found.answers:
            return None
        return found.num_new / median(found.seconds(name))

    def ratio(self, where: tuple[str, str, str], one: str, other: str) -> float | None:
        """Returns how many times as fast one engine is as another: the median of the ratios of all rounds."""
        found = self.cases.get(where)
        if found is None or one not in found.answers or other not in found.answers:
            return None
        pairs = zip(found.seconds(one), found.seconds(other), strict=True)
        return median(slow / fast for fast, slow in pairs)

    def peak(self, base: str, part: str, name: str) -> int | None:
        """Returns the resident bytes of an engine at batch 1; None: not measured."""
        found = self.cases.get((base, part, "b1"))
        return None if found is None or name not in found.answers else found.peak(name)


def write(work: Path, facts: dict[str, str], seed: int, path: Path | None) -> int:
    """Makes the page; returns the number of targets missed."""
    found = Found(work)
    page = Page("One model in every engine", seed, facts)
    page.section("Contenders", "\n".join(f"- **{name}**: {what}" for name, what in DOCUMENTED.items()))
    busy = {"@".join(key): case.others for key, case in found.cases.items() if case.others > BUSY}
    if busy:
        page.section("Disturbed", "Other processes took more than a tenth of the machine: " + ", ".join(busy))
    for base in found.bases():
        page.section(f"{base}: bytes, first token, tokens per second", _engines(found, base))
        page.section(f"{base}: all variants in llama.cpp, interleaved", _llama(found, base))
    _targets(page, found)
    if path is not None:
        path.with_suffix(".json").write_text(json.dumps(_plain(found), indent=1) + "\n")
    return page.finish(path)


def _engines(found: Found, base: str) -> str:
    rows = []
    for name, size in found.sizes[base].items():
        variant, engine, form = name.split(" | ")
        if found.peak(base, variant, name) is None:
            continue
        first = found.cases.get((base, variant, "first"))
        wait = None if first is None or name not in first.answers else median(first.seconds(name))
        rates = [found.rate(base, variant, case, name) for case in ("b1", "b8")]
        rows.append(
            [
                f"{variant}, {engine}, {form}",
                f"{size / MB:.1f}",
                f"{(found.peak(base, variant, name) or 0) / MB:.0f}",
                "-" if wait is None else f"{1000 * wait:.0f}",
                *("-" if rate is None else f"{rate:.1f}" for rate in rates),
            ]
        )
    header = ["variant, engine, weights", "weights, MB", "resident, MB", "first token of 128, ms", "tokens/s", "at 8"]
    return table(header, rows)


def _llama(found: Found, base: str) -> str:
    rows = []
    for name, size in found.sizes[base].items():
        variant, engine, form = name.split(" | ")
        if engine != "llama.cpp":
            continue
        source = f"source | llama.cpp | {form}"
        ratios = [found.ratio((base, "llama.cpp", case), name, source) for case in ("b1", "b8")]
        rate = found.rate(base, "llama.cpp", "b1", name)
        shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rows.append([f"{variant}, {form}", f"{size / MB:.1f}", "-" if rate is None else f"{rate:.1f}", *shown])
    return table(["variant, weights", "file, MB", "tokens/s", "to the source", "at batch 8"], rows)


def _targets(page: Page, found: Found) -> None:
    for base in found.bases():
        sizes = found.sizes[base]
        for loops in (2, 3):
            variant = f"strict, {loops} loops"
            own = sizes.get(f"{variant} | generate | bfloat16")
            for engine, form, width in (("llama.cpp", "bfloat16", 1), ("ONNX Runtime", "float32", 2)):
                size = sizes.get(f"{variant} | {engine} | {form}")
                if own and size:
                    over = size / (width * own) - 1
                    says = f"{base}, {variant}: {engine} file at most 2% over the fold's own bytes"
                    page.target(says, f"{over:+.1%}", over <= 0.02)
            name, source = f"{variant} | llama.cpp | int4", "source | llama.cpp | int4"
            ratio = found.ratio((base, "llama.cpp", "b1"), name, source)
            if ratio is not None:
                says = f"{base}, {variant}: in llama.cpp Q4_0 not slower than its source by over 3%"
                page.target(says, f"{ratio:.2f} times ({sizes[name] / MB:.0f} MB)", ratio >= 0.97)
        where = (base, "source", "b1")
        for says, one, other, least in (
            ("int4 in refold at least 2 times `generate` in bfloat16", "refold | int4", "generate | bfloat16", 2.0),
            ("int4 in `generate` itself beside bfloat16", "generate | int4", "generate | bfloat16", 1.0),
            ("int4 in refold within 1.3 times of llama.cpp Q4_0", "refold | int4", "llama.cpp | int4", 1 / 1.3),
            ("int8 in refold at least 1.8 times float32", "refold | int8", "refold | float32", 1.8),
            ("int8 in `generate` at least 1.8 times float32", "generate | int8", "generate | float32", 1.8),
        ):
            ratio = found.ratio(where, f"source | {one}", f"source | {other}")
            if ratio is not None:
                page.target(f"{base}, batch 1: {says}", f"{ratio:.2f} times", ratio >= least)


def _plain(found: Found) -> dict[str, Any]:
    cases = {
        "@".join(key): {
            "other_processes": case.others,
            "commit": case.commit,
            "failures": case.failures,
            "seconds": {name: case.seconds(name) for name in case.answers},
            "peak_bytes": {name: case.peak(name) for name in case.answers},
            "new_tokens": case.num_new,
        }
        for key, case in found.cases.items()
    }
    return {"sizes": found.sizes, "cases": cases}
