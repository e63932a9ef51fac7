"""Quality of a model with exits by the rule for leaving: fixed exits, an oracle, and thresholds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64

from refold.checkpoint.manifest import EXITS_NAME
from refold.data.tokens import scored_bytes
from refold.engine.exit_table import ExitTable
from refold.engine.search import GRID
from refold.engine.thresholds import Thresholds, load_thresholds
from refold.errors import RefoldError
from refold.evaluation.document_sums import DocumentCounts, ratio_error
from refold.evaluation.result import short_hash
from refold.evaluation.subject import require_tokenizer
from refold.modeling.model import RefoldForCausalLM
from refold.scorecard.exit_outcomes import ExitOutcomes, run_exits
from refold.scorecard.job import ScoreJob, SectionNotRun
from refold.scorecard.openings import OpeningAmounts, fitting_opening, read_openings, require_text
from refold.scorecard.record import ExitChoice, ExitSection


def measure_exits(job: ScoreJob) -> ExitSection:
    """Measures loss, agreement with the full depth and depths run, by rule for leaving.

    The oracle leaves at the earliest exit whose likeliest token is that of the full depth: no rule that keeps every
    token runs fewer depths. `thresholds at T` are the laxest ones with which the share of tokens that differ from the
    full depth is at most T on every other document; `calibrated at T` are those of the folder's `exits.json`. All
    figures are of the remaining documents. Tokens read keys and values of the full depth, as an engine serves with
    `kv: shared` and `recompute`.

    Raises:
        SectionNotRun: The model has no exits, or there is no text.
    """
    model = job.subject.model
    if not isinstance(model, RefoldForCausalLM) or not model.model.exit_depths:
        raise SectionNotRun(
            "a model with exits is required (it has none); convert with an `exits` section and heal with the objective "
            "`exits`"
        )
    require_text(job)
    amounts, notes = job.settings.amounts, list[str]()
    text = read_openings(job, OpeningAmounts(amounts.exit_documents, fitting_opening(job, amounts.opening)))
    stored = _find_thresholds(model, notes)
    measure = _own_measure(model)
    measures = dict.fromkeys([measure] if stored is None else [measure, stored.measure])
    with job.show.progress(f"{job.subject.facts.name}: exits", "documents") as report:
        outcomes = run_exits(model, text, tuple(measures), report)
    choosing = list(range(0, text.num_documents - 1, 2))
    judged = _Judged.of(outcomes, scored_bytes(text, require_tokenizer(job.subject)), choosing)
    choices = [judged.choice(f"exit after {depth}", at) for at, depth in enumerate(outcomes.depths[:-1])]
    choices += [judged.choice("full depth", len(outcomes.depths) - 1), judged.choice("oracle", judged.oracle())]
    for tolerance in amounts.exit_tolerances if choosing else ():
        limits = choose_thresholds(outcomes.table(measure, choosing), tolerance)
        choices.append(judged.choice(f"thresholds at {tolerance:g}", judged.leaving(measure, limits)))
    if not choosing:
        notes.append("thresholds: not chosen, because there is one document alone")
    if stored is not None:
        for level in stored.levels:
            leaving = judged.leaving(stored.measure, stored.rule(level.tolerance).thresholds)
            choices.append(judged.choice(f"calibrated at {level.tolerance:g}", leaving))
    return ExitSection(
        depths=outcomes.depths[:-1],
        num_depths=outcomes.depths[-1],
        choices=tuple(choices),
        num_documents=len(judged.documents),
        num_tokens=len(judged.chosen),
        documents=tuple(short_hash(text.document(index).astype(np.int64).tobytes()) for index in judged.documents),
        bytes=tuple(judged.sizes[judged.documents].tolist()),
        notes=tuple(notes),
    )


def choose_thresholds(table: ExitTable, tolerance: float) -> dict[int, float]:
    """Returns the laxest thresholds at which the share of differing tokens is at most a tolerance in the table.

    Each exit has an equal part of the tolerance, as in `refold calibrate`, which also proves the tolerance for other
    text and needs many more documents for it.

    Args:
        table: Confidences and errors.
        tolerance: Share of tokens, as a mean over documents.

    Returns:
        Number of depths before an exit to its threshold; exits at which no token may leave are missing.
    """
    # An exit that is never sure, such as the first one by `agreement`, needs no part.
    usable = [index for index, sure in enumerate(table.confidences) if sure.any()]
    found: dict[int, float] = {}
    for index in usable:
        losses = partial(table.losses, index)
        for threshold in GRID:
            # From strict to lax: a laxer threshold lets more tokens leave, so the share only grows.
            if losses(threshold).mean() > tolerance / len(usable):
                break
            found[table.depths[index]] = threshold
    return found


@dataclass(frozen=True)
class _Judged:
    """Outcomes at the tokens of the documents that chose no threshold.

    Attributes:
        outcomes: Outcomes at all tokens.
        documents: The documents.
        chosen: Places of their tokens.
        sizes: Bytes of each of all documents; 0 for one that is not judged.
    """

    outcomes: ExitOutcomes
    documents: list[int]
    chosen: Int64[np.ndarray, "m"]
    sizes: DocumentCounts

    @classmethod
    def of(cls, outcomes: ExitOutcomes, sizes: DocumentCounts, choosing: list[int]) -> "_Judged":
        documents = [index for index in range(outcomes.num_documents) if index not in choosing]
        is_judged = np.isin(np.arange(outcomes.num_documents), documents)
        chosen = np.flatnonzero(is_judged[outcomes.documents])
        return cls(outcomes, documents, chosen, np.where(is_judged, sizes, 0))

    def oracle(self) -> Int64[np.ndarray, "m"]:
        """Returns the first row whose likeliest token is that of the full depth, for each token."""
        best = self.outcomes.best[:, self.chosen]
        return (best == best[-1]).argmax(0)

    def leaving(self, measure: str, thresholds: Mapping[int, float]) -> Int64[np.ndarray, "m"]:
        """Returns the row at which each token leaves by thresholds."""
        last = len(self.outcomes.depths) - 1
        left = self.outcomes.table(measure, range(self.outcomes.num_documents)).leaving(thresholds)[self.chosen]
        return np.where(left < 0, last, left)

    def choice(self, rule: str, leaving: Int64[np.ndarray, "m"] | int) -> ExitChoice:
        """Returns the figures of a rule; `leaving` has the row at which each token leaves."""
        found, count = self.outcomes, len(self.chosen)
        rows = np.broadcast_to(np.asarray(leaving), count)
        nll, full = found.nll[rows, self.chosen].astype(np.float64), found.nll[-1, self.chosen].astype(np.float64)
        agrees = found.best[rows, self.chosen] == found.best[-1, self.chosen]
        num_bytes, more = int(self.sizes.sum()), self._by_document(nll - full) / math.log(2)
        shares = np.bincount(rows, minlength=len(found.depths)) / count
        return ExitChoice(
            rule=rule,
            mean_depths=float(shares @ np.array(found.depths)),
            bits_per_byte=float(nll.sum()) / math.log(2) / num_bytes,
            difference=float(more.sum()) / num_bytes,
            difference_error=ratio_error(more, self.sizes),
            agreement=float(agrees.mean()),
            agreement_error=ratio_error(self._by_document(agrees), self._count_tokens()),
            accuracy=float(found.is_right[rows, self.chosen].mean()),
            shares=tuple(shares.tolist()),
            nats=tuple(self._by_document(nll)[self.documents].tolist()),
        )

    def _by_document(self, values: np.ndarray) -> Float[np.ndarray, "num_documents"]:
        numbers = self.outcomes.documents[self.chosen]
        return np.bincount(numbers, values, minlength=self.outcomes.num_documents)

    def _count_tokens(self) -> DocumentCounts:
        return np.bincount(self.outcomes.documents[self.chosen], minlength=self.outcomes.num_documents)


def _own_measure(model: RefoldForCausalLM) -> str:
    """Returns the gate where every exit has one, else the probability of the likeliest token."""
    parts = [model.model.exit_parts(index) for index in model.model.exit_depths]
    return "gate" if all(part is not None and part.gate is not None for part in parts) else "top1"


def _find_thresholds(model: RefoldForCausalLM, notes: list[str]) -> Thresholds | None:
    """Returns the thresholds of the model's folder; adds a note where there are none that fit."""
    folder = Path(str(model.config._name_or_path or ""))
    if not (folder / EXITS_NAME).is_file():
        notes.append(f"calibrated: the folder has no {EXITS_NAME}; `refold calibrate` writes it")
        return None
    try:
        found = load_thresholds(model, "calibrated")
    except RefoldError as error:
        notes.append(f"calibrated: not measured: {error}")
        return None
    if found.kv == "propagate":
        notes.append("calibrated: the thresholds are for `kv: propagate`, the figures for exact keys and values")
    return found
