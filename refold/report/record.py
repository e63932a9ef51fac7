"""The contents of a report: each RUN as plain records, whatever kind of folder or file it was read from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refold.blueprint.schema import Blueprint
from refold.checkpoint.provenance import Stage
from refold.evaluation.result import Evaluation
from refold.planning.plan import CostPair, Plan
from refold.scorecard.record import Scorecard
from refold.sources.measurements import Measurements


@dataclass(frozen=True)
class MadeModel:
    """A model folder.

    Attributes:
        name: Its name in the report.
        folder: The folder.
        blueprint: Its stack; for a model that is not folded, that of the source itself.
        cost: Costs of source and model.
        plan: The plan that it was converted by; None: it was not converted.
        stages: Stages of its provenance, first to last.
    """

    name: str
    folder: Path
    blueprint: Blueprint
    cost: CostPair
    plan: Plan | None
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class LossScale:
    """A quantity and a text: losses of one scale are comparable.

    Attributes:
        quantity: Such as `bits per byte`.
        text: The text in words.
        key: Identity of the text and its windows.
    """

    quantity: str
    text: str
    key: str


@dataclass(frozen=True)
class LossPoint:
    """Size and loss of one model.

    Attributes:
        name: Name of the model.
        bytes: Bytes of its weights.
        loss: Loss on the scale.
        error: Standard error; None: unknown.
        scale: The scale.
        series: Name under which several models are drawn alike; empty: the model by itself.
        is_source: Whether this is the source.
    """

    name: str
    bytes: float
    loss: float
    error: float | None
    scale: LossScale
    series: str = ""
    is_source: bool = False


@dataclass(frozen=True)
class HealLog:
    """The training log of one model: its name, and the records of its steps as plain data."""

    name: str
    steps: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class NamedEvaluation:
    """An evaluation under the name of its model in the report."""

    name: str
    found: Evaluation


@dataclass(frozen=True)
class NamedScorecard:
    """A scorecard under the name of its model in the report."""

    name: str
    found: Scorecard


@dataclass(frozen=True)
class ReportRun:
    """One RUN.

    Attributes:
        name: Its name, unique in a report.
        kind: Its kind in words, such as `run`.
        path: The folder or file.
        source: Folder or hub id of the source; empty: unknown.
        line: The result in one line; empty: none.
        facts: Further facts: name and value.
        notes: Lines for the reader.
        models: Model folders, the main one first.
        points: Sizes and losses.
        logs: Training logs.
        evaluations: Evaluations on text.
        scorecards: Scorecards.
        measurements: Measurements of the source; None: none.
    """

    name: str
    kind: str
    path: Path
    source: str = ""
    line: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    models: tuple[MadeModel, ...] = ()
    points: tuple[LossPoint, ...] = ()
    logs: tuple[HealLog, ...] = ()
    evaluations: tuple[NamedEvaluation, ...] = ()
    scorecards: tuple[NamedScorecard, ...] = ()
    measurements: Measurements | None = None


def points_of(evaluations: tuple[NamedEvaluation, ...]) -> tuple[LossPoint, ...]:
    """Returns size and loss of evaluated models and of the models that they were compared with, each once."""
    found: dict[tuple[str, str, bool], LossPoint] = {}
    for each in evaluations:
        scale, against = scale_of(each.found), each.found.against
        if against is not None:
            facts = against.model
            point = LossPoint(
                "source", float(facts.weight_bytes), against.bits_per_byte, None, scale, "source", is_source=True
            )
            found.setdefault((scale.key, facts.name, True), point)
        error = each.found.bits_per_byte_error if against is None else against.difference_error
        point = LossPoint(each.name, float(each.found.model.weight_bytes), each.found.bits_per_byte, error, scale)
        found[scale.key, each.name, False] = point
    return tuple(found.values())


def scale_of(found: Evaluation) -> LossScale:
    """Returns the scale of an evaluation: its files, and the amount and windows of text."""
    names = ", ".join(data.name.rpartition("/")[2] for data in found.data)
    amount = "" if found.is_whole_data else f", the first {found.max_tokens or found.tokens:,} tokens"
    limit = None if found.is_whole_data else found.max_tokens
    key = [[data.sha256 for data in found.data], limit, found.context, found.stride]
    return LossScale("bits per byte", f"{names}{amount}", repr(key))
