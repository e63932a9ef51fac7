"""Tasks by name, group and file, and the messages where there are none."""

from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

from refold.errors import DataError, RefoldError
from refold.scorecard.tasks import choose, harness
from refold.scorecard.tasks.choose import FILES, choose_tasks

OWN = """
task: own
custom_dataset: !function refold.scorecard.tasks.items.read_items
dataset_kwargs: {file: arc_easy.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(autouse=True)
def small_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replaces the thousands of files of lm-eval, which take seconds to read, by one."""
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "sciq.yaml").write_text("task: sciq\ndataset_path: nobody/nothing\noutput_type: multiple_choice\n")

    def manager(metadata, include=None, include_defaults=False):
        return TaskManager(
            include_path=str(folder if include_defaults else include or folder),
            include_defaults=False,
            metadata=metadata,
        )

    monkeypatch.setattr(choose, "_manager", manager)


def test_names_groups_and_files_are_found(task_data, tmp_path):
    (tmp_path / "own.yaml").write_text(OWN)
    names = ["arc_easy", "lambada", "blimp_adjunct_island", str(tmp_path / "own.yaml")]
    tasks = choose_tasks(names, task_data)
    assert list(tasks) == ["arc_easy", "lambada_openai", "blimp_adjunct_island", "own"]
    item = tasks["arc_easy"].eval_docs[0]
    assert tasks["arc_easy"].fewshot_context(item, 0) == f"{item['query']}\nAnswer:"
    assert tasks["own"].fewshot_context(item, 0) == item["query"]
    pair = tasks["blimp_adjunct_island"].eval_docs[0]
    assert tasks["blimp_adjunct_island"].doc_to_choice(pair) == [pair["sentence_good"], pair["sentence_bad"]]


def test_shipped_groups_are_those_of_the_papers():
    shipped = choose._read_shipped()
    assert len(shipped.groups["seven"]) == 7
    assert len(shipped.groups["blimp"]) == 34
    assert {name for names in shipped.groups.values() for name in names} <= shipped.tasks.keys()
    metrics = {name: config["metric_list"][0]["metric"] for name, config in shipped.tasks.items()}
    by_bytes = {"hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "copa"}
    assert {name for name, metric in metrics.items() if metric == "acc_bytes"} == by_bytes
    assert set(metrics.values()) == {"acc", "acc_bytes"}


def test_lm_eval_reads_the_shipped_files_by_itself(task_data):
    manager = TaskManager(include_path=str(FILES), include_defaults=False, metadata={"task_data": str(task_data)})
    assert {"seven", "blimp", "lambada", "piqa", "copa"} <= set(manager.all_tasks)
    loaded = manager.load(["arc_easy", "winogrande"])["tasks"]
    assert len(loaded["winogrande"].eval_docs) == 40


def test_every_file_of_the_material_fits_its_task(material):
    tasks = choose_tasks(["seven", "copa"], material / "eval" / "fewshot")
    assert {name: len(task.eval_docs) for name, task in tasks.items()}["openbookqa"] == 500
    assert len(tasks) == 8
    assert len(choose_tasks(["blimp"], material / "eval" / "blimp")) == 34


def test_an_unknown_name_is_refused(task_data):
    with pytest.raises(
        RefoldError, match=r"tasks: a task or group .* is required \(got 'arc_eazy'\); did you mean 'arc_easy'"
    ):
        choose_tasks(["arc_eazy"], task_data)
    with pytest.raises(RefoldError, match=r"\(got 'copa'\); give --task-data FOLDER with its items"):
        choose_tasks(["copa"], None)
    with pytest.raises(RefoldError, match="nowhere: a folder with NAME"):
        choose_tasks(["copa"], task_data / "nowhere")


def test_missing_items_are_refused(task_data):
    with pytest.raises(DataError, match=r"piqa\.jsonl: a file of items is required \(5 other"):
        choose_tasks(["piqa"], task_data)


def test_items_of_the_hub_need_the_hub(monkeypatch):
    def unreachable(**_):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    # Without this the client tries again for half a minute.
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(RefoldError, match=r"tasks: sciq: its items cannot be read from the hub .*; go online"):
        choose_tasks(["sciq"], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            OWN.replace("doc_to_text", "doc_to_txt"),
            r"own\.yaml: a task of lm-eval is required .*did you mean 'doc_to_text'",
        ),
        (OWN.replace("output_type: multiple_choice", "output_type: guess"), "own.yaml: a task of lm-eval .*'guess'"),
        (OWN.replace("arc_easy.jsonl", "arc_hard.jsonl"), r"arc_hard\.jsonl: a file of items is required"),
        (
            OWN.replace("doc_to_target: gold", "doc_to_target: '{{answers[0]}}'"),
            "own.yaml: a task of lm-eval .*answers",
        ),
        ("task: [", "own.yaml: a YAML file is required"),
        ("- task", "own.yaml: a task of lm-eval is required .*Expected YAML dict"),
        ("group: [a]", "own.yaml: a task of lm-eval is required"),
        (OWN.replace("read_items", "read_item"), "own.yaml: a task of lm-eval .*read_item"),
        ("include: gone.yaml\n" + OWN, "own.yaml: a file that it names is missing .*gone.yaml"),
    ],
)
def test_a_broken_task_file_is_named(task_data, tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(RefoldError, match=message):
        choose_tasks([str(path)], task_data)


def test_a_missing_task_file_is_named(tmp_path):
    with pytest.raises(RefoldError, match=r"own\.yaml: a task file is required \(no such file\)"):
        choose_tasks([str(tmp_path / "own.yaml")], None)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    assert harness.require_harness().startswith("lm-eval 0.")
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(RefoldError, match=r"lm-eval is required \(not installed\); `pip install refold\[eval\]`"):
        harness.require_harness()
