import json
from pathlib import Path

import pytest

from refold.errors import FolderError
from refold.evaluation.result import DocumentScores
from refold.report.opening import read_score_file
from refold.scorecard.record import NotRun, RecallScore, RecallSection, Scorecard, from_evaluation, read_scorecard


@pytest.fixture
def card(make_evaluation) -> Scorecard:
    recall = RecallScore(
        kind="copying", length=64, depth=0.5, accuracy=0.5, exact=0.5, num_items=2, error=0.5, right=(1.0, 0.0)
    )
    documents = DocumentScores(hashes=("a1", "b2"), bytes=(40, 30), tokens=(12, 8), right=(6, 4), nats=(40.5, 32.25))
    text = make_evaluation(by_document=documents)
    found = from_evaluation(text)
    sections = {
        "recall": RecallSection(scores=(recall,), seed=0, seconds=1.0),
        "not_run": (NotRun(section="exits", why="the model has none"),),
        "settings": {"limit": 500, "text": {"context": None}},
    }
    return found.model_copy(update=sections)


def test_a_scorecard_is_read_back_from_file_and_folder(card: Scorecard, tmp_path: Path):
    path = card.write(tmp_path / "new" / "scorecard.json")
    assert read_scorecard(path) == read_scorecard(tmp_path / "new") == card
    assert [file.name for file in path.parent.iterdir()] == ["scorecard.json"]


def test_lists_of_numbers_take_one_line(card: Scorecard, tmp_path: Path):
    text = card.write(tmp_path).read_text()
    assert '"hashes": ["a1", "b2"],\n' in text
    assert '"nats": [40.5, 32.25]\n' in text
    assert '"right": [1.0, 0.0]\n' in text


def test_an_evaluation_alone_is_a_scorecard_of_text(make_evaluation, tmp_path: Path):
    text = make_evaluation(format=1)
    text.write(tmp_path)
    found = read_scorecard(tmp_path)
    assert found == read_scorecard(tmp_path / "evaluation.json") == from_evaluation(text)
    assert (found.text, found.model, found.tasks) == (text, text.model, None)
    # Where both are there, the scorecard has all.
    newer = found.model_copy(update={"command": "refold evaluate m"})
    newer.write(tmp_path)
    assert read_scorecard(tmp_path) == newer


def test_a_newer_format_is_refused_by_name(card: Scorecard, tmp_path: Path):
    path = card.write(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3, "news": 1}))
    with pytest.raises(FolderError, match=r"scorecard.json: format 3 is newer than this refold reads \(2\); update"):
        read_scorecard(path)


def test_a_figure_that_is_no_number_is_refused_with_its_place(card: Scorecard, tmp_path: Path):
    path = card.write(tmp_path)
    plain = json.loads(path.read_text())
    plain["recall"]["scores"][0]["right"][1] = float("nan")
    path.write_text(json.dumps(plain))
    for read in (read_scorecard, read_score_file):
        with pytest.raises(FolderError, match=r"recall\.scores\.0\.right\.1: a number is required \(got NaN\)"):
            read(path)


def test_sums_that_do_not_belong_to_one_list_of_documents_are_refused(card: Scorecard, tmp_path: Path):
    path = card.write(tmp_path)
    plain = json.loads(path.read_text())
    del plain["text"]["by_document"]["nats"][0]
    path.write_text(json.dumps(plain))
    with pytest.raises(FolderError, match=r"text.by_document: .*one length are required \(got 1 to 2 documents\)"):
        read_scorecard(path)


def test_what_is_no_scorecard_is_refused(card: Scorecard, tmp_path: Path):
    with pytest.raises(FolderError, match=r"a readable scorecard is required \(No such file.*; evaluate first"):
        read_scorecard(tmp_path)
    path = card.write(tmp_path)
    path.write_text(path.read_text().replace('"seconds": 1.0', '"seconds": "long"', 1))
    with pytest.raises(FolderError, match=r"a scorecard is required \(text.seconds|a scorecard is required \(recall"):
        read_scorecard(path)
    path.write_text("[{}]")
    with pytest.raises(FolderError, match=r"a scorecard is required \(Input should be an object\); evaluate again"):
        read_scorecard(path)
    path.write_bytes(b"\xff\x00")
    with pytest.raises(FolderError, match="a scorecard is required"):
        read_scorecard(path)


def test_only_an_older_result_of_evaluate_is_replaced(card: Scorecard, make_evaluation, tmp_path: Path):
    config, older = tmp_path / "config.json", tmp_path / "older.json"
    config.write_text('{"model_type": "llama"}')
    make_evaluation(format=1).write(older)
    with pytest.raises(FolderError, match=r"older.json: a new file is required \(it exists\).*--overwrite"):
        card.write(older)
    card.write(older, overwrite=True)
    assert read_scorecard(older) == card
    for path in (config, Path("/dev/null")):
        with pytest.raises(FolderError, match="got another file"):
            card.write(path, overwrite=True)
    assert config.read_text() == '{"model_type": "llama"}'
