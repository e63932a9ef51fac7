import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refold.checkpoint import provenance
from refold.checkpoint.locate import Source, locate
from refold.checkpoint.provenance import Stage, append, describe_source, read, teacher, write
from refold.errors import FolderError, SourceError
from refold.version import __version__


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.ones(3)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def test_stages_come_back_as_written(source: Path, model: Path) -> None:
    convert = Stage("convert", source=describe_source(locate(source)), recipe={"fold": {"loops": 2}}, seed=0)
    stages = append([], convert)
    write(model, stages)
    assert read(model) == [convert]
    healed = append(model, Stage("heal", seed=1, tokens=1000, command="refold heal a b"))
    assert [stage.stage for stage in healed] == ["convert", "heal"]
    assert read(model) == [convert], "append writes nothing"
    write(model, healed)
    assert read(model) == healed
    assert healed[0].versions["refold"] == __version__
    assert healed[0].versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert healed[0].source["path"] == str(source)


def test_a_folder_without_provenance_has_no_stages(model: Path) -> None:
    assert read(model) == []


def test_keys_of_later_versions_are_let_go(model: Path) -> None:
    (model / "provenance.json").write_text(json.dumps({"format": 1, "stages": [{"stage": "convert", "mood": "good"}]}))
    assert read(model)[0].stage == "convert"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"stages": [1]}', '{"stages": [{"seed": 1}]}'])
def test_damaged_provenance_is_one_line(model: Path, content: str) -> None:
    (model / "provenance.json").write_text(content)
    with pytest.raises(FolderError, match=r"provenance\.json: a list of stages is required"):
        read(model)


def test_an_absent_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise provenance.PackageNotFoundError(package)

    monkeypatch.setattr(provenance, "version", absent)
    assert Stage("convert").versions["torch"] == "absent"


def test_the_teacher_is_the_source_of_the_first_convert_stage(source: Path, model: Path) -> None:
    first = Stage("convert", source=describe_source(locate(source)))
    write(model, [first, Stage("heal", source={"path": "/elsewhere"}), Stage("convert", source={"path": "/elsewhere"})])
    assert teacher(model).fetch() == source


def test_a_teacher_that_is_gone_or_changed_is_refused(source: Path, model: Path) -> None:
    write(model, [Stage("convert", source=describe_source(locate(source)))])
    save_file({"a": torch.ones(4)}, source / "model.safetensors")
    with pytest.raises(SourceError, match="is required as it was converted"):
        teacher(model)
    source.rename(source.with_name("moved"))
    with pytest.raises(
        SourceError, match=r"its source .*source is required \(missing\); put it back or name the teacher"
    ):
        teacher(model)


@pytest.mark.parametrize("stages", [[], [Stage("heal", source={"path": "/x"})], [Stage("convert")]])
def test_a_folder_that_does_not_tell_its_teacher(model: Path, stages: list[Stage]) -> None:
    write(model, stages)
    with pytest.raises(FolderError, match=r"a convert stage in provenance\.json is required \(none\)"):
        teacher(model)


def test_a_teacher_on_the_hub_is_asked_for_at_its_commit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def find(text: str) -> Source:
        asked.append(text)
        return locate(model)

    monkeypatch.setattr(Source, "fingerprint", lambda self: {"config_sha256": "x"})
    monkeypatch.setattr(provenance, "locate", find)
    write(
        model, [Stage("convert", source={"id": "org/name", "revision": "abc", "fingerprint": {"config_sha256": "x"}})]
    )
    teacher(model)
    assert asked == ["org/name@abc"]
