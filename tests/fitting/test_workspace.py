import shutil
from pathlib import Path

import pytest

from refold.checkpoint.manifest import MANIFEST_NAME, write_manifest
from refold.errors import FolderError
from refold.fitting.workspace import FitFolder

IDENTITY = {"format": 1, "source": {"config": "a"}, "data": "text", "seed": 0}


def test_the_same_fit_goes_on_in_its_folder(tmp_path: Path) -> None:
    folder = FitFolder(tmp_path / "out")
    with folder.claim(IDENTITY):
        (folder.measured / "menu.json").write_text("{}")
    with FitFolder(tmp_path / "out").claim(IDENTITY):
        assert (folder.measured / "menu.json").exists()


@pytest.mark.parametrize("change", [{"data": "other"}, {"seed": 1}, {"source": {"config": "b"}}])
def test_another_fit_is_refused_by_what_differs(tmp_path: Path, change: dict[str, object]) -> None:
    with FitFolder(tmp_path / "out").claim(IDENTITY):
        pass
    (name,) = change
    with pytest.raises(FolderError, match=f"other {name} there"), FitFolder(tmp_path / "out").claim(IDENTITY | change):
        pass


def test_a_finished_fit_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = FitFolder(tmp_path / "out")
    with folder.claim(IDENTITY):
        folder.report.write_text("{}")
    with pytest.raises(FolderError, match="--overwrite"), folder.claim(IDENTITY):
        pass
    with folder.claim(IDENTITY, overwrite=True):
        assert folder.report.exists()


def test_a_folder_of_the_user_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(FolderError, match="other files"), FitFolder(tmp_path / "mine").claim(IDENTITY):
        pass
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(FolderError, match="got a file"), FitFolder(tmp_path / "out").claim(IDENTITY):
        pass


def test_a_recipe_has_one_folder_whatever_its_name_and_description(tmp_path: Path) -> None:
    folder = FitFolder(tmp_path / "out")
    with folder.claim(IDENTITY):
        one = folder.candidate({"seed": 1, "description": "a"}, "fit 1")
        assert folder.candidate({"description": "b", "seed": 1}, "low rank") == one
        assert folder.candidate({"seed": 2}, "fit 1") != one


@pytest.mark.parametrize("text", ["{", "[1]", "\udc80"])
def test_a_damaged_record_of_the_fit_is_named(tmp_path: Path, text: str) -> None:
    with FitFolder(tmp_path / "out").claim(IDENTITY):
        pass
    (tmp_path / "out" / "fit.json").write_bytes(text.encode(errors="surrogateescape"))
    with (
        pytest.raises(FolderError, match=r"fit\.json: the source, text and settings .* \(the file is damaged\)"),
        FitFolder(tmp_path / "out").claim(IDENTITY),
    ):
        pass


def _candidate(folder: FitFolder, name: str, text: str) -> Path:
    candidate = folder.candidate({"description": "", "name": name}, name)
    (candidate / "converted").mkdir()
    (candidate / "converted" / "config.json").write_text(text)
    write_manifest(candidate / "converted")
    shutil.copy(candidate / "converted" / MANIFEST_NAME, candidate)
    return candidate


def test_a_published_model_is_known_by_its_contents(tmp_path: Path) -> None:
    folder = FitFolder(tmp_path / "out")
    with folder.claim(IDENTITY):
        first, second = _candidate(folder, "a", "{}"), _candidate(folder, "b", "{ }")
        assert not folder.is_published(first)
        folder.publish(first / "converted")
        assert folder.is_published(first)
        assert not folder.is_published(second)
        folder.publish(second / "converted")
        assert (folder.model / "config.json").read_text() == "{ }"
        assert not folder.is_published(first)
        (folder.model / "config.json").unlink()
        with pytest.raises(FolderError, match="required whole"):
            folder.is_published(second)


def test_a_model_folder_of_the_user_is_never_deleted(tmp_path: Path) -> None:
    folder = FitFolder(tmp_path / "out")
    with folder.claim(IDENTITY):
        first = _candidate(folder, "a", "{}")
        folder.model.mkdir()
        (folder.model / "mine.txt").write_text("keep")
        with pytest.raises(FolderError, match="got another folder"):
            folder.publish(first / "converted")
        assert (folder.model / "mine.txt").read_text() == "keep"
        assert (first / "converted").exists()
