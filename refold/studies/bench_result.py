"""The result of a bench: speeds, waiting times and memory of each contender in each scenario."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, ValidationError

from refold.checkpoint.atomic_file import require_free, write_file, write_json
from refold.evaluation.result import Machine

FILE_NAME, FIGURE_NAME = "bench.json", "bench.png"
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Quartiles(_Record):
    """A median over rounds with the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Quartiles":
        """Returns the quartiles of at least one value."""
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(median=median, low=low, high=high)


class Latency(_Record):
    """Seconds over all requests of all rounds."""

    median: float
    p99: float

    @classmethod
    def of(cls, values: list[float]) -> "Latency":
        """Returns the quantiles of at least one value."""
        median, p99 = np.quantile(values, [0.5, 0.99]).tolist()
        return cls(median=median, p99=p99)


class BenchRow(_Record):
    """One contender in one scenario."""

    contender: str
    scenario: str
    tokens_per_second: Quartiles
    """New tokens per second, from the arrival of the first request to the last new token."""
    ratio: Quartiles
    """Tokens per second over those of the first contender, within rounds."""
    first_token: Latency
    """Seconds from the arrival of a request to its first new token."""
    between_tokens: Latency
    """Mean seconds from one new token of a request to its next."""
    memory: int | None
    """Bytes that loading the contender and running it added at most; None where the system does not tell."""
    depths: float | None
    """Mean share of the depths that new tokens ran; None where the contender does not tell."""
    accepted: float | None
    """Share of drafted tokens that were accepted; None without drafts."""
    tokens_per_price: dict[str, float]
    """New tokens for one unit of money, by machine of the price list."""


class Bench(_Record):
    """A bench of one model."""

    format: Literal[1] = 1
    model: str
    against: str | None
    machine: Machine
    settings: dict[str, Any]
    rows: tuple[BenchRow, ...]
    """By scenario, then by contender."""
    notes: tuple[str, ...]
    """Contenders that were not measured, with the reason."""

    def write(self, folder: str | Path, overwrite: bool = False) -> None:
        """Writes the result and its figure into a folder.

        Args:
            folder: Made if it is missing.
            overwrite: Replace those of an earlier bench.

        Raises:
            FolderError: A file is in the way, or the folder cannot be written.
        """
        path = require_free_bench(folder, overwrite)
        write_json(path, self.model_dump(mode="json"))
        figure = draw_bench(self)
        write_file(path.with_name(FIGURE_NAME), lambda unfinished: figure.savefig(unfinished, format="png", dpi=150))


def require_free_bench(folder: str | Path, overwrite: bool = False) -> Path:
    """Checks that a bench can be written into a folder, and returns the path of its result.

    Raises:
        FolderError: A file is in the way.
    """
    return require_free(Path(folder) / FILE_NAME, "result of `bench`", _is_bench, overwrite)


def draw_bench(found: Bench) -> Figure:
    """Draws tokens per second by scenario, with quartiles over rounds."""
    scenarios = list(dict.fromkeys(row.scenario for row in found.rows))
    contenders = list(dict.fromkeys(row.contender for row in found.rows))
    figure = Figure(figsize=(2 + 1.6 * len(scenarios), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(contenders))
    for number, name in enumerate(contenders):
        rows = {row.scenario: row for row in found.rows if row.contender == name}
        places = [place for place, each in enumerate(scenarios) if each in rows]
        speeds = [rows[scenarios[place]].tokens_per_second for place in places]
        axes.bar(
            [place + (number - (len(contenders) - 1) / 2) * width for place in places],
            [speed.median for speed in speeds],
            width,
            yerr=[[each.median - each.low for each in speeds], [each.high - each.median for each in speeds]],
            color=COLOURS[number % len(COLOURS)],
            ecolor="#666666",
            label=name,
        )
    axes.set_xticks(range(len(scenarios)), scenarios)
    axes.set_ylabel("new tokens per second")
    axes.set_title("Tokens per second; bars: quartiles over rounds")
    axes.legend(fontsize=7)
    return figure


def _is_bench(path: Path) -> bool:
    try:
        Bench.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return False
    return True
