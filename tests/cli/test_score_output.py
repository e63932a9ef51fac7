import json
from pathlib import Path

import pytest

from refold.cli.score_output import plan_files
from refold.errors import FolderError, RefoldError
from refold.scorecard.names import numbered_names, short_names
from refold.scorecard.record import read_scorecard

WINDOWS = ("--context", "32", "--device", "cpu", "--dtype", "float32")


def test_models_are_named_by_as_little_of_their_paths_as_tells_them_apart():
    assert short_names(["runs/a/model", "runs/b/model"]) == ["a-model", "b-model"]
    assert short_names(["healed", "org/name"]) == ["healed", "name"]
    assert short_names(["x/m", "m"]) == ["x-m", "m"]
    assert short_names(["m", "m"]) == ["m", "m"]
    assert short_names([]) == []
    assert numbered_names(["a", "b", "a"]) == ["a", "b", "a (2)"]


def test_a_name_of_dots_is_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert short_names(["."]) == ["mine"]


def test_files_are_planned_before_any_work(tmp_path: Path, make_evaluation):
    assert plan_files(None, ["a", "b"], False) == []
    assert plan_files(tmp_path, ["a"], False) == [tmp_path / "scorecard.json"]
    assert plan_files(tmp_path / "out", ["x/a", "b"], False) == [
        tmp_path / "out" / "a.json",
        tmp_path / "out" / "b.json",
    ]
    with pytest.raises(FolderError, match=r"cards.json: a folder is required for the scorecards of 2 models"):
        plan_files(tmp_path / "cards.json", ["a", "b"], False)
    with pytest.raises(RefoldError, match=r"different models are required \(got a, a\); name each once"):
        plan_files(tmp_path / "out", ["a", "a"], False)
    make_evaluation().write(tmp_path / "out" / "b.json")
    with pytest.raises(FolderError, match=r"b.json: a new file is required"):
        plan_files(tmp_path / "out", ["a", "b"], False)
    assert len(plan_files(tmp_path / "out", ["a", "b"], True)) == 2


@pytest.fixture(scope="module")
def models(make_model) -> list[Path]:
    return [make_model(), make_model("gpt_neox")]


def test_two_models_are_evaluated_into_a_folder_and_compared(models, sentences, command, tmp_path: Path):
    rows = [json.dumps({"text": text}) for text in sentences]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    wanted = ("evaluate", *models, "-d", tmp_path / "text.jsonl", *WINDOWS, "--out", tmp_path / "cards", "--json")
    done = command(*wanted)
    assert done.status == 0, done.err
    printed = json.loads(done.out)
    files = sorted((tmp_path / "cards").iterdir())
    cards = [read_scorecard(file) for file in files]
    assert sorted(card["model"]["name"] for card in printed) == sorted(map(str, models))
    assert sorted(card.model.name for card in cards) == sorted(map(str, models))
    assert cards[0].command.startswith("refold evaluate ")
    again = command(*wanted)
    assert (again.status, "pass --overwrite" in again.err) == (2, True)
    page = tmp_path / "page.md"
    compared = command("compare", *files, "--out", page)
    assert compared.status == 0, compared.err
    assert "paired: text over 5 documents" in compared.out
    assert "| bits per byte | " in page.read_text()
    found = json.loads(command("compare", *files, "--json").out)
    row = next(row for row in found["rows"] if row["name"] == "bits per byte")
    texts = [card.text for card in cards]
    assert [cell["value"] for cell in row["cells"]] == [text.bits_per_byte for text in texts if text is not None]


def test_the_source_has_a_scorecard_and_a_missing_section_its_reason(models, sentences, command, tmp_path: Path):
    (tmp_path / "text.txt").write_text(sentences[0])
    wanted = ("evaluate", models[1], "--against", models[0], "--exits", "-d", tmp_path / "text.txt", *WINDOWS)
    refused = command(*wanted, "--out", tmp_path / "one.json")
    assert refused.status == 2
    assert "a folder is required for the scorecards of 2 models, the source included" in refused.err
    done = command(*wanted, "--out", tmp_path / "cards")
    assert done.status == 0, done.err
    assert len(list((tmp_path / "cards").iterdir())) == 2
    assert done.out.count("exits: not run: ") == 2


def test_neither_text_nor_section_is_a_mistake(models, command):
    done = command("evaluate", models[0])
    assert done.status == 2
    assert "a text or a section is required (got neither); give one of --data, --tasks, --recall" in done.err
