"""Reading of RUNs: model folders, analyses and JSON files; other kinds of folders by the packages that know them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from refold.blueprint.cost import cost
from refold.checkpoint import provenance
from refold.checkpoint.folder import settle
from refold.checkpoint.locate import PLAN_NAME, locate
from refold.checkpoint.source_file import read_file
from refold.conversion.inspect import inspect
from refold.errors import FolderError, SourceError
from refold.healing.log import LOG_NAME, read_log
from refold.planning.build import identity_blueprint
from refold.planning.plan import CostPair, read_plan
from refold.report.record import HealLog, MadeModel, NamedEvaluation, NamedScorecard, ReportRun, points_of
from refold.scorecard.record import read_scorecard
from refold.sources.measurements import MEASUREMENTS_NAME, Measurements
from refold.sources.source_model import read_source_model


@dataclass(frozen=True)
class RunKind:
    """A kind of folder.

    Attributes:
        name: Its name in messages, such as "`refold run`".
        marker: A file that every such folder has.
        read: Reads the folder.
    """

    name: str
    marker: str
    read: Callable[[Path], ReportRun]


def open_runs(paths: Sequence[str | Path], kinds: Sequence[RunKind] = ()) -> list[ReportRun]:
    """Reads RUNs, each under a name of its own.

    Args:
        paths: Folders and JSON files; a folder of scorecards stands for its files.
        kinds: Kinds of folders beside models and analyses, the first that fits decides.

    Raises:
        FolderError: A path is no RUN, or unfinished, torn or of a newer version.
        SourceError: A model is damaged.
    """
    known = (*kinds, ANALYSIS_FOLDER, MODEL_FOLDER)
    found = [_open(each, known) for path in paths for each in _list_files(Path(path).expanduser(), known)]
    names = [run.name for run in found]
    longer = [f"{run.path.absolute().parent.name}/{run.name}" for run in found]
    unique = [longer[place] if names.count(name) > 1 else name for place, name in enumerate(names)]
    numbered = [f"{name} ({place})" if unique.count(name) > 1 else name for place, name in enumerate(unique, 1)]
    return [replace(run, name=name) for run, name in zip(found, numbered, strict=True)]


def _list_files(path: Path, kinds: Sequence[RunKind]) -> list[Path]:
    """Returns the JSON files of a folder of no known kind, as `refold evaluate` writes for several models."""
    if not path.is_dir() or any((path / kind.marker).is_file() for kind in kinds):
        return [path]
    return sorted(path.glob("*.json")) or [path]


def _open(path: Path, kinds: Sequence[RunKind]) -> ReportRun:
    if path.is_file():
        return read_score_file(path)
    settle(path)
    for kind in kinds:
        if (path / kind.marker).is_file():
            return kind.read(path)
    markers = ", ".join(kind.marker for kind in kinds)
    got = f"a folder without any of {markers}" if path.is_dir() else "nothing"
    names = ", ".join(kind.name for kind in kinds)
    raise FolderError(
        f"{path}: a folder of {names}, or a JSON file of `refold evaluate`, is required (got {got}); check the path"
    )


def read_model(folder: Path, name: str) -> MadeModel:
    """Reads a model folder, folded or not, without its weights.

    Raises:
        FolderError: The folder is torn.
        SourceError: It is no model, or damaged.
    """
    stages = tuple(provenance.read(folder))
    if "blueprint" in locate(folder).read_config():
        found = inspect(folder)
        plan = read_plan(folder / PLAN_NAME) if (folder / PLAN_NAME).exists() else None
        return MadeModel(name, folder, found.blueprint, found.cost, plan, stages)
    model = read_source_model(folder)
    blueprint = identity_blueprint(model.arch)
    whole = cost(blueprint, model.dtype_bytes)
    return MadeModel(name, folder, blueprint, CostPair(source=whole, target=whole), None, stages)


def read_heal_log(folder: Path, name: str) -> tuple[HealLog, ...]:
    """Reads the training log in a model folder; empty if the model was not healed.

    Raises:
        FolderError: A line of the log is damaged.
    """
    path = folder / LOG_NAME
    try:
        steps = tuple(read_log(path))
    except (ValueError, OSError) as error:
        raise FolderError(f"{path}: a training log of `refold heal` is required ({error}); copy it again") from None
    return (HealLog(name, steps),) if steps else ()


def source_name(model: MadeModel) -> str:
    """Returns the folder or hub id that a model was made from; empty if it was not converted."""
    first = model.stages[0].source if model.stages else {}
    return str(first.get("id") or first.get("path") or "")


def _read_model_folder(path: Path) -> ReportRun:
    name = path.absolute().name
    model = read_model(path, name)
    notes = () if model.plan is None else tuple(note.text for note in model.plan.notes)
    logs = read_heal_log(path, name)
    return ReportRun(name, "model", path, source_name(model), models=(model,), logs=logs, notes=notes)


def _read_analysis_folder(path: Path) -> ReportRun:
    file = path / MEASUREMENTS_NAME
    found = parse_record(file, Measurements, "measurements of `refold analyse`")
    source = found.source.path or found.source.id or ""
    about = f"{found.text.tokens:,} tokens of {found.text.name}"
    facts = (("measured on", about),)
    return ReportRun(path.absolute().name, "analysis", path, source, facts=facts, notes=found.notes, measurements=found)


def read_score_file(path: Path) -> ReportRun:
    """Reads a JSON file of `refold evaluate`.

    Raises:
        FolderError: It is another file, or of a newer format.
    """
    card = read_scorecard(path)
    name = short_name(card.model.name)
    named = () if card.text is None else (NamedEvaluation(name, card.text),)
    against = None if card.text is None else card.text.against
    return ReportRun(
        name=path.stem,
        kind="scorecard",
        path=path,
        source="" if against is None else against.model.name,
        points=points_of(named),
        evaluations=named,
        scorecards=(NamedScorecard(name, card),),
    )


def short_name(model: str) -> str:
    """Returns the last two names of a model's path."""
    return "/".join(model.rstrip("/").split("/")[-2:])


def read_object(path: Path, kind: str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FolderError: The file cannot be read, or holds something else.
    """
    try:
        data = json.loads(read_file(path))
    except (SourceError, ValueError, RecursionError) as error:
        raise FolderError(f"{path}: a {kind} is required ({str(error)[:80]}); make it again") from None
    if not isinstance(data, dict):
        raise FolderError(f"{path}: a {kind} is required (got a JSON {type(data).__name__}); check the path")
    return data


def parse_record(path: Path, record: Any, kind: str) -> Any:
    """Reads a file as a record.

    Raises:
        FolderError: The file cannot be read, or is no such record.
    """
    try:
        return record.model_validate(read_object(path, kind))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        said = f"{where}: {first['msg']}" if where else first["msg"]
        raise FolderError(f"{path}: {kind} of this version is required ({said}); make it again") from None


MODEL_FOLDER = RunKind("a model", "config.json", _read_model_folder)
ANALYSIS_FOLDER = RunKind("`refold analyse`", MEASUREMENTS_NAME, _read_analysis_folder)
