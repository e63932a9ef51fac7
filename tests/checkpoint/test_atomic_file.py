import json
import os
from pathlib import Path

import pytest

from refold.checkpoint.atomic_file import flush, is_unfinished, json_text, require_free, write_json, write_text
from refold.errors import FolderError


class Killed(BaseException):
    """Stands for a kill."""


def test_what_is_written_is_read_back_and_nothing_else_is_left(tmp_path: Path):
    path = tmp_path / "new" / "facts.json"
    for value in ({"loss": [1.5, None]}, {"text": "grüße\n"}):
        write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value
    assert [each.name for each in path.parent.iterdir()] == ["facts.json"]


def test_json_has_lists_of_numbers_and_words_on_one_line():
    value = {"a": [1, 2.5, None], "b": [], "c": [{"d": ["x\n  y", "z"]}, [[1], [2]]], "e": ["[\n1\n]", "{"], "f": "[]"}
    text = json_text(value)
    assert json.loads(text) == value
    lines = [line.strip() for line in text.splitlines()]
    assert '"a": [1, 2.5, null],' in lines
    assert '"d": ["x\\n  y", "z"]' in lines
    assert "[1]," in lines
    assert json_text({"at": Path("x")}, default=str) == '{\n  "at": "x"\n}'


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str):
    path = tmp_path / "facts.json"
    write_json(path, "old")

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, kill)
        # A killed process removes nothing.
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            write_json(path, "new")
    assert json.loads(path.read_text()) == "old"
    (left,) = [each for each in tmp_path.iterdir() if each != path]
    assert is_unfinished(left)
    write_json(path, "new")
    assert json.loads(path.read_text()) == "new"


def test_bytes_are_on_disk_before_the_name_and_the_name_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done = []
    real = {"fsync": os.fsync, "replace": os.replace}
    for name, call in real.items():
        monkeypatch.setattr(os, name, lambda *given, name=name, call=call: (done.append(name), call(*given))[1])
    write_text(tmp_path / "a", "text")
    assert done == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("name", ["facts.json", ".facts.json.12.unfinished.old", ".hidden", "a.1.unfinished"])
def test_other_files_are_not_taken_for_unfinished_ones(name: str):
    assert not is_unfinished(Path(name))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"e.json: a writable place is required \(.*\); choose another, or make room"):
        write_json(tmp_path / "file" / "e.json", 1)


def test_files_and_folders_can_be_flushed(tmp_path: Path):
    (tmp_path / "file").write_text("")
    flush(tmp_path / "file")
    flush(tmp_path)
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "none")


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match=r"a writable place is required .*file is a file.; choose another"):
        require_free(tmp_path / "file" / "result.json", "report", lambda path: True)
    assert require_free(tmp_path / "new" / "result.json", "report", lambda path: True)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(FolderError, match=r"a writable place is required .* is read-only.; choose another"):
        require_free(tmp_path / "new" / "result.json", "report", lambda path: True)
