"""The throughput by live exits, from the results of `benchmarks/engine_exits.py`."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refold.claims.claim import ClaimArm, ClaimNotRun
from refold.claims.record import FindingRecord, Outcome

if TYPE_CHECKING:
    from refold.claims.workbench import Workbench

WAY = "exits live"


@dataclass(frozen=True)
class RecordedThroughput:
    """A comparison of throughput, that holds if live exits reach a ratio over full depth with many requests.

    Attributes:
        factor: The ratio.
    """

    factor: float

    @property
    def arms(self) -> tuple[ClaimArm, ...]:
        """None: nothing is made."""
        return ()

    def find(self, bench: "Workbench") -> list[FindingRecord]:
        """Reads the ratio of every model at its largest batch; its range over rounds is the interval.

        Raises:
            ClaimNotRun: No results were given, or they are of another kind.
        """
        path = bench.require(
            "engine", "results of the engine are required; give --engine docs/results/engine-exits.json of the sources"
        )
        return [self._finding(name, rows, row) for name, rows, row in _rows(path)]

    def _finding(self, model: str, batch: str, row: dict[str, Any]) -> FindingRecord:
        low, high = (math.log2(each / self.factor) for each in row["spread"])
        effect = math.log2(row["over full depth"] / self.factor)
        outcome: Outcome = "holds" if low > 0 else "fails" if high < 0 else "open"
        # The file has the smallest and largest round only: a range of five rounds is about 2.3 standard deviations.
        error = (high - low) / 2.3 / math.sqrt(5)
        return FindingRecord(
            comparison=f"{model} with live exits {self.factor:g} times as fast as full depth, {batch} at once",
            domain="engine",
            unit="doublings of speed",
            effect=effect,
            low=low,
            high=high,
            error=error,
            detectable=2.8 * error,
            least=0.0,
            num_seeds=1,
            num_documents=0,
            outcome=outcome,
            note=f"{row['over full depth']:.2f} times; the interval is the range over rounds",
        )


def _rows(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields model, batch and figures of live exits, at the largest batch of each model."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [
            (model, batch := max(batches, key=int), next(row for row in batches[batch] if row["way"] == WAY))
            for model, batches in found.items()
            if isinstance(batches, dict) and all(key.isdigit() for key in batches)
        ]
    except (OSError, ValueError, KeyError, TypeError, StopIteration, AttributeError) as error:
        raise ClaimNotRun(f"{path}: results of benchmarks/engine_exits.py are required ({error!r})") from error
    if not rows:
        raise ClaimNotRun(f"{path}: results of benchmarks/engine_exits.py are required (no model in it)")
    yield from rows
