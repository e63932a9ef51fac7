"""Few-shot tasks of a scorecard: items drawn by seed, scored by lm-eval, with standard errors."""

import statistics
import time
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from refold.errors import RefoldError
from refold.evaluation.document_sums import mean_error
from refold.evaluation.subject import evaluating
from refold.scorecard.job import ScoreJob
from refold.scorecard.pairing import Difference, average
from refold.scorecard.record import TaskScore, TaskSection
from refold.scorecard.settings import ScoreSettings
from refold.scorecard.tasks.choose import choose_tasks, explained_task
from refold.scorecard.tasks.harness import quiet_harness, require_harness
from refold.scorecard.tasks.items import draw_order
from refold.suggest import shorten

HEADLINES = ("acc_bytes", "acc_norm", "acc", "exact_match")
"""Headline metrics, the preferred first; the first metric of a task that has none of these."""
HASH_LENGTH = 12
POOL = 64
"""Most items that are kept for worked examples, if all items would be scored."""


def measure_tasks(job: ScoreJob) -> TaskSection:
    """Scores the tasks of a job with its model.

    Raises:
        RefoldError: lm-eval is missing, a task is unknown or broken, or has too few items for its worked examples.
        DataError: Items are missing or broken.
        SourceError: The model has no tokenizer.
    """
    harness = require_harness()
    settings = job.settings
    with quiet_harness():
        from lm_eval.evaluator import evaluate

        from refold.scorecard.tasks.model import RefoldLM

        begun = time.perf_counter()
        tasks, drawn = _prepare(settings)
        with (
            job.show.progress(f"{job.subject.facts.name}: tasks", "answers") as report,
            evaluating(job.subject.model),
        ):
            model = RefoldLM(job.subject.model, job.subject.tokenizer, progress=report)
            found: Any = evaluate(model, {"tasks": tasks, "groups": {}}, samples=drawn, bootstrap_iters=0)
    assert found is not None
    scores = tuple(_task_score(name, tasks[name], found, len(tasks[name].eval_docs)) for name in tasks)
    mean = average([Difference(score.value, score.error) for score in scores])
    return TaskSection(
        tasks=scores,
        average=mean.value,
        average_error=mean.error,
        harness=harness,
        seconds=time.perf_counter() - begun,
    )


def require_tasks(settings: ScoreSettings) -> None:
    """Checks the tasks of settings and their items, without a model.

    Raises:
        RefoldError: lm-eval is missing, a task is unknown or broken, or has too few items for its worked examples.
        DataError: Items are missing or broken.
    """
    require_harness()
    with quiet_harness():
        tasks, drawn = _prepare(settings)
        for name, task in tasks.items():
            items = list(task.eval_docs)
            for index in drawn[name]:
                _require_question(task, items[index], index)


def _prepare(settings: ScoreSettings) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Returns the tasks by name, and the items to score of each."""
    tasks = choose_tasks(settings.tasks, settings.task_data)
    drawn = {name: _draw(task, settings.shots, settings.limit, settings.seed) for name, task in tasks.items()}
    return tasks, drawn


def _require_question(task: Any, item: Any, index: int) -> None:
    """Checks that the templates of a task make a question, choices and a right answer of an item."""
    with explained_task(f"{task.task_name}: item {index + 1}"):
        text, target = task.doc_to_text(item), task.doc_to_target(item)
        if task.OUTPUT_TYPE != "multiple_choice":
            return
        choices, gold = task.doc_to_choice(item), text if task.multiple_input else target
    # lm-eval scores an item without a right answer as wrong, with nothing but a warning.
    is_there = 0 <= gold < len(choices) if isinstance(gold, int) else not isinstance(gold, str) or gold in choices
    if not is_there:
        raise RefoldError(
            f"{task.task_name}: item {index + 1}: the right answer must be one of {len(choices)} choices, or its place "
            f"from 0 to {len(choices) - 1} (got {shorten(gold)}); mend doc_to_target or the item"
        )


def _draw(task: Any, shots: int | None, limit: int | None, seed: int) -> list[int]:
    """Returns the items to score, in their order, and gives a task its worked examples from among the others."""
    # A task whose file says 0 has no place for examples; lm-eval keeps it so, too.
    if shots is not None and task.config.num_fewshot != 0:
        task.set_config("num_fewshot", shots)
    count = task.config.num_fewshot or 0
    with explained_task(task.task_name):
        items = list(task.eval_docs)
        strata = [_stratum(task, item) for item in items]
    order = draw_order(strata, seed, task.task_name)
    scored = order if limit is None else order[:limit]
    task.set_fewshot_seed(seed)
    if count and _draws_from_scored_split(task):
        kept = max(count + 1, min(POOL, len(items) // 4), len(items) - len(scored))
        scored = order[: max(0, len(items) - kept)]
        if not scored:
            raise RefoldError(
                f"tasks: {task.task_name}: more than {count + 1} items are required for {count} worked examples "
                f"(got {len(items)}); lower --shots"
            )
        task.sampler.replace_df([items[index] for index in order[len(scored) :]])
    return sorted(scored)


def _draws_from_scored_split(task: Any) -> bool:
    """Says whether lm-eval would take worked examples from the items that it scores."""
    config = task.config
    if task.fewshot_cfg.samples is not None:
        return False
    if config.fewshot_split is None:
        # lm-eval's rule: training, else validation, else test.
        taken = config.training_split or config.validation_split or config.test_split
    else:
        taken = config.fewshot_split
    return taken == (config.test_split if task.has_test_docs() else config.validation_split)


def _stratum(task: Any, item: Any) -> Hashable:
    """Returns the place of the right answer where there are choices, else one stratum for all."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0
    gold = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
    return gold if isinstance(gold, int) else 0


def _task_score(name: str, task: Any, found: Any, num_available: int) -> TaskScore:
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    kept = samples[0]["filter"]
    samples = [sample for sample in samples if sample["filter"] == kept]
    metrics = {
        key.partition(",")[0]: float(value)
        for key, value in found["results"][name].items()
        if key.endswith(f",{kept}") and "_stderr" not in key and isinstance(value, int | float)
    }
    headline = next((metric for metric in HEADLINES if metric in metrics), next(iter(metrics)))
    right = tuple(float(sample[headline]) for sample in samples if isinstance(sample[headline], int | float))
    return TaskScore(
        name=name,
        metric=headline,
        value=metrics[headline],
        error=mean_error(np.array(right)),
        chance=_chance(task, [sample["doc"] for sample in samples]),
        metrics=metrics,
        shots=task.config.num_fewshot or 0,
        num_items=len(samples),
        num_available=num_available,
        version=str(task.VERSION),
        items=tuple(sample["doc_hash"][:HASH_LENGTH] for sample in samples),
        right=right,
    )


def _chance(task: Any, items: Sequence[Any]) -> float | None:
    """Returns the accuracy of random choices, or None for tasks without choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    return statistics.fmean(1 / len(task.doc_to_choice(item)) for item in items)
