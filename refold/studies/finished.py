"""A finished run folder as a part of a report."""

from pathlib import Path

from pydantic import ValidationError

from refold.errors import FolderError
from refold.evaluation.result import Evaluation
from refold.report.opening import RunKind, read_heal_log, read_model, read_object, source_name
from refold.report.record import NamedEvaluation, ReportRun, points_of
from refold.studies.baselines import BASELINES

RUN_NAME = "run.json"
SUMMARY_NAME = "summary.json"
RUN_FOLDER_FORMAT = 1
"""Format of the run folder."""


def read_run_folder(root: Path) -> ReportRun:
    """Reads a folder of `refold run`.

    Raises:
        FolderError: The run is unfinished, damaged or of a newer version, or its model is missing.
    """
    given = read_object(root / RUN_NAME, "record of `refold run`").get("format")
    if given != RUN_FOLDER_FORMAT:
        raise FolderError(
            f"{root / RUN_NAME}: a run of format {RUN_FOLDER_FORMAT} is required (got {given}); update refold"
        )
    path = root / SUMMARY_NAME
    if not path.exists():
        raise FolderError(
            f"{root}: a finished run is required ({SUMMARY_NAME} is missing); repeat its command to go on"
        )
    summary = read_object(path, "summary of `refold run`")
    try:
        folder = root / summary["model"]
        unhealed = Evaluation.model_validate(summary["unhealed"])
        healed = Evaluation.model_validate(summary["healed"])
        rivals = {name: Evaluation.model_validate(found) for name, found in summary["baselines"].items()}
        line, notes = str(summary["line"]), tuple(map(str, summary.get("notes", ())))
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        said = " ".join(str(error).split())[:120]
        raise FolderError(f"{path}: a summary of `refold run` is required ({said}); repeat the run") from None
    name = line.partition(":")[0]
    model = read_model(folder, name)
    own = (NamedEvaluation(name, healed),)
    if unhealed != healed:
        own = (NamedEvaluation(f"{name}, unhealed", unhealed), *own)
    evaluations = (*own, *(NamedEvaluation(_describe(rival, found), found) for rival, found in rivals.items()))
    arms = {
        name: root / "folded" / "model",
        **{_describe(rival, found): root / rival / "model" for rival, found in rivals.items()},
    }
    return ReportRun(
        name=root.absolute().name,
        kind="run",
        path=root,
        source=source_name(model),
        line=line,
        notes=(*notes, *(() if model.plan is None else (note.text for note in model.plan.notes))),
        models=(model,),
        points=points_of(evaluations),
        logs=tuple(log for arm, place in arms.items() for log in read_heal_log(place, arm)),
        evaluations=evaluations,
    )


def _describe(rival: str, found: Evaluation) -> str:
    baseline = BASELINES.get(rival)
    if baseline is None:
        return rival
    return (
        baseline.description if found.model.quantised is None else f"{baseline.description} in {found.model.quantised}"
    )


RUN_FOLDER = RunKind("`refold run`", RUN_NAME, read_run_folder)
