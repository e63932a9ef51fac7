"""Scores of tasks, beside lm-eval's own evaluation of its `hf` model, and shuffled labels at chance."""

import inspect
import json
import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.evaluator import evaluate
from lm_eval.models import huggingface

from refold.conversion.convert import ConvertOptions, convert
from refold.errors import RefoldError, SourceError
from refold.evaluation.subject import open_subject
from refold.exporting.export import export
from refold.progress import Show
from refold.scorecard.job import ScoreJob, SectionNotRun
from refold.scorecard.record import TaskScore, TaskSection
from refold.scorecard.settings import ScoreSettings
from refold.scorecard.tasks.choose import choose_tasks
from refold.scorecard.tasks.harness import quiet_harness
from refold.scorecard.tasks.measure import _draw, measure_tasks, require_tasks

HFLM: Any = huggingface.HFLM

SHIPPED = Path(__file__).parents[3] / "refold" / "shipped" / "stdlib-5m"
NAMES = ("arc_easy", "winogrande", "lambada_openai", "blimp_adjunct_island")


def measure(model: Any, show: Show | None = None, **settings: Any) -> TaskSection:
    job = ScoreJob(model, open_subject(model, device="cpu"), None, None, ScoreSettings(**settings), show or Show())
    return measure_tasks(job)


def by_hf(folder: Path, names: tuple[str, ...], data: Path, drawn: dict[str, list[int]] | None = None) -> Any:
    with quiet_harness():
        tasks = {"tasks": choose_tasks(names, data), "groups": {}}
        model = HFLM(pretrained=str(folder), device="cpu", batch_size=4)
        return evaluate(model, tasks, samples=drawn, bootstrap_iters=0)  # type: ignore[arg-type]


def check(score: TaskScore, found: Any) -> None:
    """Compares a score with lm-eval's results, to the last digit but for perplexity."""
    expected = found["results"][score.name]
    for metric, value in score.metrics.items():
        assert value == pytest.approx(expected[f"{metric},none"], rel=1e-4 if metric == "perplexity" else 0.0, abs=0.0)
    samples = found["samples"][score.name]
    assert score.right == tuple(sample[score.metric] for sample in samples)
    assert score.items == tuple(sample["doc_hash"][:12] for sample in samples)
    assert score.error == pytest.approx(statistics.stdev(score.right) / len(samples) ** 0.5)


@pytest.fixture(scope="module")
def source(make_model) -> Path:
    return make_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def scored(source, task_data) -> TaskSection:
    return measure(str(source), tasks=NAMES, task_data=task_data)


def test_figures_are_those_of_hf(scored, source, task_data):
    found = by_hf(source, NAMES, task_data)
    assert [score.name for score in scored.tasks] == list(NAMES)
    for score in scored.tasks:
        check(score, found)
        assert (score.num_items, score.num_available, score.shots, score.version) == (40, 40, 0, "refold-1")
    assert [score.metric for score in scored.tasks] == ["acc_bytes", "acc", "acc", "acc"]
    assert [score.chance for score in scored.tasks] == [0.25, 0.5, None, 0.5]
    assert scored.average == pytest.approx(statistics.fmean(score.value for score in scored.tasks))
    assert scored.average_error == pytest.approx(sum((score.error or 0) ** 2 for score in scored.tasks) ** 0.5 / 4)
    assert scored.harness.startswith("lm-eval 0.")
    assert TaskSection.model_validate_json(scored.model_dump_json()) == scored


def test_figures_of_a_fold_are_those_of_its_dense_export_in_hf(source, task_data, tmp_path):
    recipe = {"fold": {"loops": 2}, "relax": {"rank": 2, "init": "svd"}}
    convert(source, tmp_path / "fold", recipe, options=ConvertOptions(allow_larger=True))
    export(tmp_path / "fold", tmp_path / "dense")
    scores = measure(str(tmp_path / "fold"), tasks=NAMES[:2], task_data=task_data)
    found = by_hf(tmp_path / "dense", NAMES[:2], task_data)
    for score in scores.tasks:
        check(score, found)


def test_a_limit_draws_the_same_balanced_items_for_every_model(scored, source, make_model, task_data):
    fewer = measure(str(source), tasks=NAMES, task_data=task_data, limit=12)
    other = measure(str(make_model("qwen2", num_hidden_layers=1)), tasks=NAMES, task_data=task_data, limit=12)
    drawn = measure(str(source), tasks=NAMES, task_data=task_data, limit=12, seed=1)
    gold = {}
    for line in (task_data / "arc_easy.jsonl").read_text().splitlines():
        item = json.loads(line)
        gold[item["query"]] = item["gold"]
    for few, all_items, same, differs in zip(fewer.tasks, scored.tasks, other.tasks, drawn.tasks, strict=True):
        assert (few.num_items, few.num_available) == (12, 40)
        assert few.items == same.items
        assert few.items != differs.items
        # An item keeps its result, whichever others are drawn.
        results = dict(zip(all_items.items, all_items.right, strict=True))
        assert few.right == tuple(results[item] for item in few.items)
    task = choose_tasks(["arc_easy"], task_data)["arc_easy"]
    places = {each: item["gold"] for each, item in zip(scored.tasks[0].items, task.eval_docs, strict=True)}
    assert Counter(places[item] for item in fewer.tasks[0].items) == {0: 3, 1: 3, 2: 3, 3: 3}


def test_examples_come_from_items_that_are_not_scored(source, task_data, monkeypatch):
    from lm_eval.api.task import ConfigurableTask

    contexts: list[Any] = []
    built = ConfigurableTask.fewshot_context
    monkeypatch.setattr(
        ConfigurableTask,
        "fewshot_context",
        lambda self, *given, **named: contexts.append(built(self, *given, **named)) or contexts[-1],
    )
    for limit, count in ((None, 30), (5, 5)):
        contexts.clear()
        (score,) = measure(str(source), tasks=("arc_easy",), task_data=task_data, limit=limit, shots=2).tasks
        assert (score.shots, score.num_items, len(contexts)) == (2, count, count)
        queries = [context.rpartition("\n\n")[2] for context in contexts]
        examples = {part.rpartition(" ")[0] for context in contexts for part in context.split("\n\n")[:-1]}
        assert all(context.count("Answer:") == 3 for context in contexts)
        assert not any(example.startswith(query) for example in examples for query in queries)
    with pytest.raises(RefoldError, match="arc_easy: more than 41 items are required for 40 worked examples"):
        measure(str(source), tasks=("arc_easy",), task_data=task_data, shots=40)


def test_a_task_without_a_place_for_examples_has_none(source, task_data):
    (score,) = measure(str(source), tasks=NAMES[3:], task_data=task_data, shots=2, limit=4).tasks
    assert score.shots == 0


def library_items() -> list[dict[str, Any]]:
    """Pieces of Python code whose next piece is to be found among those of other places."""
    generator = random.Random(5)
    text = "".join(inspect.getsource(module) for module in (json.decoder, statistics, inspect))
    places = generator.sample(range(0, len(text) - 600, 300), 40)
    items = []
    for index, place in enumerate(places):
        choices = [text[other + 200 : other + 240] for other in generator.sample(places, 4)]
        choices[index % 4] = text[place + 200 : place + 240]
        items.append({"query": text[place + 100 : place + 200], "choices": choices, "gold": index % 4})
    return items


def test_shuffled_labels_score_at_chance(tmp_path, write_items):
    items = library_items()
    write_items(tmp_path / "hellaswag.jsonl", items)
    (score,) = measure(str(SHIPPED), tasks=("hellaswag",), task_data=tmp_path).tasks
    assert score.error is not None
    assert score.value > 0.25 + 3 * score.error
    labels = [item["gold"] for item in items]
    random.Random(3).shuffle(labels)
    write_items(
        tmp_path / "hellaswag.jsonl", [{**item, "gold": gold} for item, gold in zip(items, labels, strict=True)]
    )
    (score,) = measure(str(SHIPPED), tasks=("hellaswag",), task_data=tmp_path).tasks
    assert score.error is not None
    assert abs(score.value - 0.25) < 2.3 * score.error


def test_real_items_score_as_in_hf(material):
    folder, data = material / "models" / "stories260K", material / "eval" / "fewshot"
    names = ("winogrande", "openbookqa")
    section = measure(str(folder), tasks=names, task_data=data, limit=12)
    hashes = {score.name: set(score.items) for score in section.tasks}
    tasks = choose_tasks(names, data)
    drawn = {}
    for name, task in tasks.items():
        drawn[name] = _draw(task, None, 12, 0)
    found = by_hf(folder, names, data, drawn)
    for score in section.tasks:
        check(score, found)
        assert len(hashes[score.name]) == 12


def test_nothing_is_written_to_the_terminal(source, task_data, capfd):
    measure(str(source), tasks=NAMES[:1], task_data=task_data, limit=4)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_model_without_tokenizer_is_refused(make_source, task_data):
    with pytest.raises(SourceError, match="a tokenizer is required"):
        measure(str(make_source("llama")), tasks=NAMES[:1], task_data=task_data)


def test_a_task_file_that_fits_the_first_item_alone_is_named(source, tmp_path):
    (tmp_path / "items.jsonl").write_text('{"q": "a", "all": ["b", "c"]}\n{"q": "a", "all": ["b"]}\n')
    (tmp_path / "own.yaml").write_text(
        "task: own\ncustom_dataset: !function refold.scorecard.tasks.items.read_items\n"
        "dataset_kwargs: {file: items.jsonl}\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: q\ndoc_to_choice: all\ndoc_to_target: '{{all[1] | upper}}'\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    with pytest.raises(RefoldError, match="own: a task of lm-eval is required"):
        measure(str(source), tasks=(str(tmp_path / "own.yaml"),), task_data=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_to_text": "{{choices[gold + 1]}}"}, r"own: item 2: a task of lm-eval is required \(UndefinedError"),
        ({"doc_to_choice": "{{choices if gold == 0 else chioces}}"}, "own: item 2: a task of lm-eval .*UndefinedError"),
        ({"doc_to_target": "{{gold + 1}}"}, r"own: item 2: the right answer .* 2 choices.*0 to 1 \(got 2\)"),
        ({"doc_to_target": "{{query}}"}, r"own: item 1: the right answer must be one of 2 choices.*\(got 'a b'\)"),
    ],
)
def test_templates_are_checked_on_every_item_before_a_model_loads(change, message, tmp_path, write_items):
    write_items(
        tmp_path / "items.jsonl", [{"query": "a b", "choices": ["x", "y"], "gold": gold} for gold in (0, 1, 1, 0)]
    )
    templates = {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}

    def settings(templates: dict[str, str]) -> ScoreSettings:
        lines = [
            "task: own",
            "custom_dataset: !function refold.scorecard.tasks.items.read_items",
            "dataset_kwargs: {file: items.jsonl, fields: [query, choices, gold]}",
            "test_split: test",
            "output_type: multiple_choice",
            *(f'{key}: "{value}"' for key, value in templates.items()),
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
        ]
        (tmp_path / "own.yaml").write_text("\n".join(lines))
        return ScoreSettings(tasks=(str(tmp_path / "own.yaml"),), task_data=tmp_path)

    require_tasks(settings(templates))
    with pytest.raises(RefoldError, match=message):
        require_tasks(settings(templates | change))


def test_answers_that_do_not_fit_the_model_leave_the_other_sections_alone(make_model, tmp_path, write_items):
    model = make_model("llama", num_hidden_layers=1, max_position_embeddings=8)
    write_items(tmp_path / "copa.jsonl", [{"query": "a", "choices": ["b " * 20, "c"], "gold": 0}] * 2)
    with pytest.raises(SectionNotRun, match=r"answers of 1 to 8 tokens are required, .* \(got one of \d\d\)"):
        measure(str(model), tasks=("copa",), task_data=tmp_path)
