"""Mistakes and mishaps of exports, for every target: nothing is left, and nothing of the user is lost."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from refold.conversion.convert import ConvertOptions, convert
from refold.errors import ExportError, FolderError, SourceError
from refold.exporting.export import export, survey
from refold.exporting.registry import TARGETS
from refold.exporting.target import ExportJob

RECIPES: dict[str, dict[str, Any]] = {
    "strict": {"fold": {"loops": 2}},
    "dropped": {"drop": {"attention": {"layers": [1]}}},
    "hybrid": {"mixers": [{"type": "gla", "depths": [0]}], "share_kv": [{"depth": 3, "from": 1}]},
    "relaxed": {"fold": {"loops": 2}, "relax": {"type": "lora", "rank": 4}},
    "prefixes": {"fold": {"loops": 2}, "relax": {"type": "prefix", "length": 3}},
}


@pytest.fixture(scope="module")
def folded(make_source, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("folded")

    def make(case: str) -> Path:
        if not (folder / case).exists():
            convert(make_source("llama"), folder / case, RECIPES[case], options=ConvertOptions(allow_larger=True))
        return folder / case

    return make


@pytest.fixture
def holdable(folded) -> Callable[[str], Path]:
    """Gives a model that a target can hold."""

    def find(target: str) -> Path:
        for case in RECIPES:
            if any(each.target.name == target and each.num_bytes is not None for each in survey(folded(case))):
                return folded(case)
        pytest.skip(f"{target} holds none of {', '.join(RECIPES)}")

    return find


def _left(place: Path) -> list[str]:
    """Names in a folder, hidden ones too; locks may stay."""
    return sorted(path.name for path in place.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("case", RECIPES)
def test_a_target_that_cannot_hold_the_model_writes_nothing(folded, tmp_path, case):
    refused = [each.target.name for each in survey(folded(case)) if each.verdict.status == "impossible"]
    for name in refused:
        with pytest.raises(
            ExportError, match=rf"export: {name} cannot hold this model: .*; see `refold export --list`"
        ):
            export(folded(case), tmp_path / "deep" / name, name)
    assert _left(tmp_path) == []


def test_some_target_refuses_and_some_holds(folded):
    found = {each.target.name: each.verdict.status for each in survey(folded("hybrid"))}
    assert found["dense"] == "impossible"
    assert found["hub"] == "kept"


@pytest.mark.parametrize("name", TARGETS)
def test_a_full_disk_leaves_nothing_behind(holdable, tmp_path, monkeypatch, name):
    def fill(self: Any, job: ExportJob) -> tuple[str, ...]:
        (job.out.path / "half.bin").write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    model = holdable(name)
    monkeypatch.setattr(type(TARGETS[name]), "write", fill)
    with pytest.raises(FolderError, match=r"disk full .No space left on device; free: \d+ bytes.; make room or choose"):
        export(model, tmp_path / "new" / "out", name)
    assert _left(tmp_path) == []


@pytest.mark.parametrize("name", TARGETS)
def test_a_failed_export_leaves_the_former_folder(holdable, tmp_path, monkeypatch, name):
    model = holdable(name)
    former = export(model, tmp_path / "out", "hub")
    before = {path.name: path.read_bytes() for path in former.iterdir()}

    def fail(self: Any, job: ExportJob) -> tuple[str, ...]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(TARGETS[name]), "write", fail)
    with pytest.raises(FolderError, match="disk full"):
        export(model, tmp_path / "out", name, overwrite=True)
    assert _left(tmp_path) == ["out"]
    assert {path.name: path.read_bytes() for path in former.iterdir()} == before


@pytest.mark.parametrize("name", TARGETS)
def test_too_small_a_disk_is_seen_before_a_weight_is_read(holdable, tmp_path, monkeypatch, name):
    model = holdable(name)

    def refuse(self: Any, job: ExportJob) -> tuple[str, ...]:
        raise AssertionError("written")

    monkeypatch.setattr(type(TARGETS[name]), "write", refuse)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(FolderError, match=r"\d+ bytes of disk are required .free: 1000.; make room or choose another"):
        export(model, tmp_path / "out", name)
    assert _left(tmp_path) == []


@pytest.mark.parametrize("name", TARGETS)
def test_files_of_the_user_are_never_overwritten(holdable, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FolderError, match=r"it holds other files, which are never overwritten.; choose another"):
            export(holdable(name), tmp_path / "out", name, overwrite=overwrite)
        with pytest.raises(FolderError, match=r"a folder's place is required .got a file.; choose another output"):
            export(holdable(name), tmp_path / "file", name, overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "mine"


def _copy(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("manifest.json"))
    return place


@pytest.mark.parametrize("name", TARGETS)
def test_a_model_without_one_of_its_tensors_is_refused(holdable, tmp_path, name):
    model = _copy(holdable(name), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    lost = next(each for each in tensors if ".mlps.0." in each)
    save_file({each: tensors[each] for each in tensors if each != lost}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(FolderError, match=lost.replace(".", r"\.")):
        export(model, tmp_path / "out", name)
    assert _left(tmp_path) == ["model"]


@pytest.mark.parametrize("name", TARGETS)
def test_truncated_weights_are_refused(holdable, tmp_path, name):
    model = _copy(holdable(name), tmp_path / "model")
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises((SourceError, FolderError), match=r"model\.safetensors"):
        export(model, tmp_path / "out", name)
    assert _left(tmp_path) == ["model"]


def test_a_missing_model_and_a_model_without_weights_are_refused(folded, tmp_path):
    with pytest.raises(SourceError, match=r"a folder.* or hub id .* is required .no"):
        export(tmp_path / "nowhere", tmp_path / "out", "hub")
    model = _copy(folded("strict"), tmp_path / "model")
    (model / "model.safetensors").unlink()
    with pytest.raises((SourceError, FolderError), match="safetensors"):
        export(model, tmp_path / "out", "hub")
    assert _left(tmp_path) == ["model"]
