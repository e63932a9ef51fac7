import json
from pathlib import Path

import pytest

from refold.checkpoint import provenance
from refold.checkpoint.manifest import verify
from refold.conversion.convert import convert
from refold.errors import ExportError, FolderError, RefoldError
from refold.exporting.export import export
from refold.exporting.registry import TARGETS, find_target
from refold.modeling.load import load_model


@pytest.fixture
def folded(make_source, tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for file in make_source("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "LICENSE").write_text("do as you like")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    convert(source, tmp_path / "folded", {"fold": {"loops": 2}})
    return tmp_path / "folded"


def test_licence_template_card_and_provenance_go_along(folded: Path, tmp_path: Path):
    out = export(folded, tmp_path / "out", command="refold export folded out")
    assert verify(out) == ()
    assert (out / "LICENSE").read_text() == "do as you like"
    assert (out / "chat_template.jinja").is_file()
    card = (out / "README.md").read_text()
    assert "base_model: source" in card
    assert "license: mit" in card
    assert "the model has no tokenizer: none was copied" in card
    assert "import refold" in (folded / "README.md").read_text()
    assert "import refold" not in card
    assert 'AutoModelForCausalLM.from_pretrained("THIS FOLDER")' in card
    stages = provenance.read(out)
    assert [stage.stage for stage in stages] == ["convert", "export"]
    assert stages[1].source["path"] == str(folded)
    assert stages[1].recipe == {"to": "dense", "dtype": "float32"}
    assert stages[1].command == "refold export folded out"


def test_an_export_is_a_source_again(folded: Path, tmp_path: Path):
    out = export(folded, tmp_path / "out")
    assert load_model(out, device="cpu").config.model_type == "llama"
    convert(out, tmp_path / "again", {"fold": {"loops": 2}})


def test_a_taken_place_is_only_overwritten_when_asked(folded: Path, tmp_path: Path):
    out = export(folded, tmp_path / "out")
    with pytest.raises(FolderError, match=r"a new folder is required .it exists.; choose another or pass --overwrite"):
        export(folded, out)
    export(folded, out, dtype="bfloat16", overwrite=True)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_model_itself_is_never_replaced(folded: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(folded)
    for place in (folded, tmp_path / "link"):
        with pytest.raises(FolderError, match="another folder than the model's is required"):
            export(folded, place, overwrite=True)
    assert json.loads((folded / "config.json").read_text())["model_type"] == "refold"


def test_a_source_is_refused(make_source, tmp_path: Path):
    with pytest.raises(ExportError, match=r"a folded model is required .got model_type 'llama'.; it is not one of"):
        export(make_source("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_blueprint_is_refused(folded: Path, tmp_path: Path):
    (folded / "manifest.json").unlink()
    config = json.loads((folded / "config.json").read_text())
    config["blueprint"]["depths"][0]["mixer"] = -1
    (folded / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"blueprint.depths.0.mixer: Input should .*; convert the source"):
        export(folded, tmp_path / "out")


def test_an_unknown_target_is_refused(folded: Path, tmp_path: Path):
    with pytest.raises(ExportError, match=r"to: must be one of dense .got 'dens'.; did you mean 'dense'"):
        export(folded, tmp_path / "out", "dens")


def test_an_unknown_dtype_is_refused(folded: Path, tmp_path: Path):
    with pytest.raises(RefoldError, match=r"dtype: must be one of float32, bfloat16, float16 .got 'int8'."):
        export(folded, tmp_path / "out", dtype="int8")


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_says_where_it_is_described(name: str):
    target = find_target(name)
    assert target.name == name
    assert target.url.startswith("https://")
    assert target.summary
