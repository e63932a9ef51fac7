"""The study `run`: plans, converts, heals and evaluates a model and its baselines, and reports them in one line."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refold.blueprint.quantisation import holds_integers
from refold.checkpoint.atomic_file import is_unfinished, write_json
from refold.checkpoint.locate import PLAN_NAME
from refold.checkpoint.lock import FolderLock
from refold.data.corpus import Data
from refold.errors import FolderError, RecipeError, RefoldError, given_or_default
from refold.evaluation.reference import Reference
from refold.evaluation.result import Evaluation
from refold.planning.plan import Plan, StackPlan, read_plan
from refold.progress import Show
from refold.recipe.load import RecipeLike
from refold.report.page import write_report
from refold.sources.source_model import SourceModel
from refold.studies.arm import RunArm
from refold.studies.baselines import BASELINES, BaselineJob, whole_model_stages
from refold.studies.finished import RUN_FOLDER_FORMAT, RUN_NAME, SUMMARY_NAME, read_run_folder
from refold.studies.job import DEFAULT_RECIPE, RunJob, RunOptions, RunSettings, read_job


def describe_size(ratio: float) -> str:
    """Returns a size ratio in words: `48% smaller`, `12% larger` or `the same size`."""
    change = round(abs(1 - ratio) * 100)
    return "the same size" if change == 0 else f"{change}% {'smaller' if ratio < 1 else 'larger'}"


def describe_loss(difference: float, error: float | None = None) -> str:
    """Returns a difference as text, such as `+0.041`, with its standard error if it is not significant."""
    certain = error is None or abs(difference) >= 2 * error
    return f"{difference:+.3f}" + ("" if certain else f" ± {error:.3f}")


def report_line(
    name: str,
    plan: Plan,
    difference: float,
    difference_error: float | None,
    baselines: dict[str, float],
    context: int,
) -> str:
    """Returns a line with size, loss, cache and compute of a folded model, and the losses of its baselines.

    Args:
        name: Name of the recipe.
        plan: Plan of the folded model.
        difference: Bits per byte above the source.
        difference_error: Standard error of the difference.
        baselines: Bits per byte above the source of each baseline, by description.
        context: Number of tokens for the comparison of cache and FLOPs.
    """
    rows = {row.quantity: row.ratio for row in plan.summary(context)}
    rivals = ", ".join(f"{rival}: {describe_loss(lost)}" for rival, lost in baselines.items())
    size = describe_size(rows["weight_bytes"] or 1.0)
    loss = f"{describe_loss(difference, difference_error)} bits per byte to the source"
    cache, compute = (1.0 if rows[key] is None else rows[key] for key in ("cache_bytes", "flops"))
    return f"{name}: {size}, {loss}{f' ({rivals})' if rivals else ''}, cache {cache:.2f}x, compute {compute:.2f}x"


CONTEXT = 8192
PAGE_NAME = "report.html"


@dataclass(frozen=True)
class RunResult:
    """Holds the figures of a run, and the folder of its model.

    Attributes:
        plan: Plan of the folded model.
        model: Folder of the healed model.
        unhealed: Evaluation after conversion.
        healed: Evaluation of `model`.
        baselines: Evaluations of the baselines, by name.
        line: The report in one line.
        notes: Lines about the data, such as the warning about a single kind of text.
    """

    plan: Plan
    model: Path
    unhealed: Evaluation
    healed: Evaluation
    baselines: dict[str, Evaluation]
    line: str
    notes: tuple[str, ...] = ()


def run(
    source: str | Path,
    destination: str | Path,
    recipe: RecipeLike = DEFAULT_RECIPE,
    data: Data = (),
    *,
    held_out: Data | None = None,
    settings: RunSettings | None = None,
    options: RunOptions | None = None,
) -> RunResult:
    """Plans, converts, heals and evaluates a model and its baselines. The same call resumes an unfinished run.

    The run folder holds `folded/` and a folder for each baseline, each with `converted/`, `model/` (healed) and its
    evaluations, `summary.json`, and the page `report.html` with its pictures. A recipe with
    `quantise` adds `folded/quantised/`, which is evaluated as healed.

    Args:
        source: Folder or hub id.
        destination: The run folder.
        recipe: Built-in name, YAML file, mapping or Recipe.
        data: Text for healing and calibration (see `refold.data.corpus`), preferably a weighted mixture of several
            kinds; without `held_out` a fiftieth of each kind, chosen by content, is held out for evaluation.
        held_out: Text for evaluation.
        settings: Tokens, baselines and other settings that affect the figures.
        options: Overrides of the recipe, and display.

    Raises:
        RefoldError: The errors of the stages, or the folder has other contents.
    """
    options = given_or_default(options, RunOptions, "options")
    job = read_job(source, recipe, data, held_out, given_or_default(settings, RunSettings, "settings"), options)
    root, device, show = Path(destination), job.settings.device, options.show
    if not (root / RUN_NAME).exists():
        for line in job.notes:
            show.say(line)
    with _claimed(root, job):
        show.say(f"evaluating on up to {job.settings.eval_tokens:,} held-out tokens for each model (--eval-tokens)")
        against = Reference(job.source, device=device)

        def arm(name: str) -> RunArm:
            stages = job.stages if name == "folded" else whole_model_stages(job.stages)
            return RunArm(
                folder=root / name,
                source=job.source,
                train=job.train,
                held_out=job.held_out,
                stages=stages,
                against=against,
                eval_tokens=job.settings.eval_tokens,
                device=device,
                command=options.command,
                show=show,
            )

        folded = arm("folded")
        converted = folded.convert(job.plan)
        made = read_plan(converted / PLAN_NAME)
        unhealed = folded.evaluate(converted, "unhealed")
        healed_model = folded.heal(converted)
        assert isinstance(healed_model, Path)
        recipe = job.plan.recipe
        if recipe.quantise is not None and job.stages and not holds_integers(made.blueprint):
            healed_model = folded.quantise(healed_model, recipe)
        healed = folded.evaluate(healed_model, "healed") if job.stages else unhealed
        rivals = {name: _measure_baseline(arm(name), job.model, made) for name in job.baselines}
        found = {name: evaluation for name, evaluation in rivals.items() if evaluation is not None}
        # A line about training text of one kind says the same.
        notes = job.notes or healed.notes
        for line in () if job.notes else healed.notes:
            show.say(line)
        result = replace(_summarise(job.name, made, healed_model, unhealed, healed, found), notes=notes)
        _write_summary(root, result, job.settings)
        _write_page(root, show)
    return result


def _write_page(root: Path, show: Show) -> None:
    try:
        with show.progress("drawing the page", "pictures") as report:
            write_report([read_run_folder(root)], root / PAGE_NAME, overwrite=True, progress=report)
    except RefoldError as error:
        # The figures are written: a user's file at the place of the page does not make the run fail.
        show.say(f"no page: {error}")


def _measure_baseline(arm: RunArm, model: SourceModel, plan: StackPlan) -> Evaluation | None:
    name = arm.folder.name
    baseline = BASELINES[name]
    if baseline.needs_healing and not arm.stages:
        return None
    try:
        start = baseline.start(BaselineJob(arm.source, model, plan, arm.convert))
    except RecipeError as error:
        arm.show.say(f"{name}: no baseline ({error})")
        return None
    if baseline.scheme is not None:
        return arm.evaluate(start, "unhealed", baseline.scheme(plan))
    return arm.evaluate(arm.heal(start), "healed" if arm.stages else "unhealed")


@contextlib.contextmanager
def _claimed(root: Path, job: RunJob) -> Iterator[None]:
    """Locks the run folder, new or of the same run; removes a new folder if the run fails without results."""
    is_new = not root.exists()
    _claim(root, job)
    with FolderLock(root):
        try:
            yield
        except BaseException:
            if is_new and not _has_results(root):
                for path in root.iterdir():
                    path.unlink() if path.is_file() else path.rmdir()
                root.rmdir()
            raise


def _claim(root: Path, job: RunJob) -> None:
    """Makes the run folder, or checks that it belongs to the same run."""
    wanted = json.loads(json.dumps(_identity(job)))
    path = root / RUN_NAME
    if root.exists() and not root.is_dir():
        raise FolderError(f"{root}: a folder's place is required (got a file); choose another output")
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        # A run folder of an older version has only a part of the source's fingerprint.
        known = {key: value for key, value in wanted["source"].items() if key in begun.get("source", {})}
        different = list(_differences(begun, {**wanted, "source": known}))
        if different and _has_results(root):
            raise FolderError(
                f"{root}: an unfinished or finished run with other settings lies there ({'; '.join(different)}); "
                f"repeat its command to go on, or choose another output"
            )
        if not different:
            return
    elif root.exists() and not all(is_unfinished(path) for path in root.iterdir()):
        raise FolderError(
            f"{root}: a new folder, or one of an earlier run, is required (it holds other files); choose another output"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{root}: a writable place is required ({error.strerror}); choose another output") from None
    write_json(path, wanted)


def _identity(job: RunJob) -> dict[str, Any]:
    return {
        "format": RUN_FOLDER_FORMAT,
        "source": job.plan.source.model_dump(mode="json"),
        "recipe": job.plan.recipe.model_dump(mode="json"),
        "settings": {key: value for key, value in vars(job.settings).items() if key != "device"},
        "data": job.train.identity,
        "held_out": job.held_out.identity,
    }


def _differences(begun: Any, wanted: Any, where: str = "") -> Iterator[str]:
    """Yields `key.path was A, is B` for each value that differs."""
    if isinstance(begun, dict) and isinstance(wanted, dict):
        for key in sorted(begun.keys() | wanted.keys()):
            yield from _differences(begun.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))
    elif begun != wanted:
        old, new = (text if len(text) <= 40 else f"{text[:37]}..." for text in map(json.dumps, (begun, wanted)))
        yield f"{where} was {old}, is {new}"


def _has_results(root: Path) -> bool:
    """Returns whether any arm of the run has a file."""
    return any(any(arm.iterdir()) for arm in root.iterdir() if arm.is_dir())


def _summarise(
    name: str, plan: Plan, model: Path, unhealed: Evaluation, healed: Evaluation, rivals: dict[str, Evaluation]
) -> RunResult:
    assert healed.against is not None
    lost = {
        _describe(arm, found): found.against.difference for arm, found in rivals.items() if found.against is not None
    }
    context = min(CONTEXT, plan.blueprint.arch.max_position_embeddings)
    line = report_line(name, plan, healed.against.difference, healed.against.difference_error, lost, context)
    return RunResult(plan, model, unhealed, healed, rivals, line)


def _describe(arm: str, found: Evaluation) -> str:
    """Returns the description of a baseline; for a quantised baseline with scheme and size."""
    description = BASELINES[arm].description
    if found.model.quantised is None or found.against is None:
        return description
    size = describe_size(found.model.weight_bytes / found.against.model.weight_bytes)
    return f"{description} in {found.model.quantised}, {size}"


def _write_summary(root: Path, result: RunResult, settings: RunSettings) -> None:
    data = {
        "line": result.line,
        "notes": list(result.notes),
        "model": str(result.model.relative_to(root)) if result.model.is_relative_to(root) else str(result.model),
        "cost": result.plan.cost.model_dump(mode="json"),
        "settings": vars(settings),
        "unhealed": result.unhealed.model_dump(mode="json"),
        "healed": result.healed.model_dump(mode="json"),
        "baselines": {name: found.model_dump(mode="json") for name, found in result.baselines.items()},
    }
    write_json(root / SUMMARY_NAME, data)
