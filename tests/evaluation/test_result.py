import json
from collections.abc import Callable
from pathlib import Path

import pytest

from refold.errors import FolderError
from refold.evaluation.result import Comparison, Evaluation, ModelFacts, read_evaluation


@pytest.fixture
def evaluation(make_evaluation: Callable[..., Evaluation]) -> Evaluation:
    against = Comparison(
        model=ModelFacts(name="s", model_type="llama", parameters=10, weight_bytes=40, dtype="float32"),
        bits_per_byte=1.4,
        bits_per_byte_error=0.1,
        perplexity=8.0,
        accuracy=0.6,
        difference=0.1,
        difference_error=0.01,
        agreement=0.9,
        kl=0.2,
    )
    return make_evaluation(against=against)


def test_what_is_written_is_read_back(evaluation: Evaluation, tmp_path: Path):
    path = evaluation.write(tmp_path / "new" / "evaluation.json")
    assert read_evaluation(path) == read_evaluation(tmp_path / "new") == evaluation
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]


def test_a_folder_gets_a_file_of_the_usual_name(evaluation: Evaluation, tmp_path: Path):
    assert evaluation.write(tmp_path) == tmp_path / "evaluation.json"
    assert json.loads((tmp_path / "evaluation.json").read_text())["stride"] == 8


@pytest.mark.parametrize("overwrite", [False, True])
def test_only_an_older_evaluation_is_replaced(evaluation: Evaluation, tmp_path: Path, overwrite: bool):
    config, link, folder = tmp_path / "config.json", tmp_path / "link.json", tmp_path / "folder"
    config.write_text('{"model_type": "llama"}')
    evaluation.write(tmp_path / "real.json")
    link.symlink_to(tmp_path / "real.json")
    (folder / "evaluation.json").mkdir(parents=True)
    for path in (config, link, folder, Path("/dev/null")):
        with pytest.raises(FolderError, match=r"(got another file|got a folder|it exists)"):
            evaluation.write(path, overwrite)
    assert config.read_text() == '{"model_type": "llama"}'
    assert link.is_symlink()
    if overwrite:
        evaluation.write(tmp_path / "real.json", overwrite)
    else:
        with pytest.raises(FolderError, match=r"real.json: a new file is required \(it exists\)"):
            evaluation.write(tmp_path / "real.json")


def test_a_place_that_cannot_be_written_is_named(evaluation: Evaluation, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"file: a writable place is required \(.*choose another"):
        evaluation.write(tmp_path / "file" / "e.json")


def test_what_is_no_evaluation_is_refused(evaluation: Evaluation, tmp_path: Path):
    with pytest.raises(FolderError, match=r"a readable evaluation is required \(No such file.*; evaluate first"):
        read_evaluation(tmp_path)
    path = evaluation.write(tmp_path)
    path.write_text(path.read_text().replace('"tokens": 20', '"tokens": "many"'))
    with pytest.raises(FolderError, match=r"an evaluation is required .tokens: Input should be .*; evaluate again"):
        read_evaluation(tmp_path)
    path.write_text("{")
    with pytest.raises(FolderError, match=r"an evaluation is required .Invalid JSON.*; evaluate again"):
        read_evaluation(tmp_path)


def test_files_of_format_1_are_read_and_newer_ones_refused(evaluation: Evaluation, tmp_path: Path):
    path = evaluation.write(tmp_path)
    plain = json.loads(path.read_text())
    older = {name: value for name, value in plain.items() if name != "by_document"}
    path.write_text(json.dumps({**older, "format": 1}))
    assert read_evaluation(path) == evaluation.model_copy(update={"format": 1})
    path.write_text(json.dumps({**plain, "format": 3}))
    with pytest.raises(FolderError, match=r"json: format 3 is newer than this refold reads \(2\); update refold"):
        read_evaluation(path)
    # A file of a newer refold is nothing to replace.
    with pytest.raises(FolderError, match="got another file"):
        evaluation.write(path, overwrite=True)
