import json
from pathlib import Path

import pytest
import torch

from refold.checkpoint import provenance
from refold.checkpoint.manifest import verify
from refold.conversion.convert import ConvertOptions, convert
from refold.conversion.quantise import quantise
from refold.errors import ExportError, FolderError, RefoldError
from refold.exporting.export import export, survey, write_export
from refold.exporting.registry import TARGETS, find_target, targets_for
from refold.exporting.target import ExportOptions
from refold.exporting.targets.dense import DENSE
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
    out = write_export(folded, tmp_path / "out", DENSE, ExportOptions(), command="refold export folded out")
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
        with pytest.raises(FolderError, match="another place than the model's is required"):
            export(folded, place, overwrite=True)
    assert json.loads((folded / "config.json").read_text())["model_type"] == "refold"


@pytest.mark.parametrize("place", ["", "model.gguf"])
def test_the_file_of_a_source_is_never_replaced(place: str, make_source, tmp_path: Path):
    pytest.importorskip("gguf")
    out = export(make_source("llama"), tmp_path / "out", "gguf")
    before = (out / "model.gguf").read_bytes()
    with pytest.raises(FolderError, match="another place than the model's is required"):
        export(out, out / place, "gguf" if place else "dense", overwrite=True)
    with pytest.raises(FolderError, match="another place than the model's is required"):
        convert(out, out, {"fold": {"loops": 2}}, options=ConvertOptions(overwrite=True))
    assert (out / "model.gguf").read_bytes() == before


def test_a_source_is_exported_as_its_identity(make_source, tmp_path: Path):
    out = export(make_source("phi3"), tmp_path / "out")
    tokens = torch.arange(1, 25)[None]
    with torch.no_grad():
        ours, theirs = (load_model(each, device="cpu")(tokens).logits for each in (out, make_source("phi3")))
    assert torch.equal(ours, theirs)


def test_a_broken_blueprint_is_refused(folded: Path, tmp_path: Path):
    (folded / "manifest.json").unlink()
    config = json.loads((folded / "config.json").read_text())
    config["blueprint"]["depths"][0]["mixer"] = -1
    (folded / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"blueprint.depths.0.mixer: Input should .*; convert the source"):
        export(folded, tmp_path / "out")


def test_an_unknown_target_is_refused(folded: Path, tmp_path: Path):
    with pytest.raises(ExportError, match=r"to: must be one of .*dense.* .got 'dens'.; did you mean 'dense'"):
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantise": "int3"}, r"quantise: (dense stores floats only|must be one of)"),
        ({"keep": {"head": "int8"}}, r"keep: quantise is required with it"),
    ],
)
def test_formats_that_the_target_lacks_are_refused(folded: Path, tmp_path: Path, options, message: str):
    with pytest.raises(ExportError, match=message):
        export(folded, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_survey_says_what_is_repeated_and_what_is_impossible(make_source, folded: Path, tmp_path: Path):
    (dense,) = (each for each in survey(folded) if each.target.name == "dense")
    assert (dense.verdict.status, dense.verdict.reasons) == ("larger", ("tied weights are repeated",))
    assert dense.num_bytes is not None
    written = (export(folded, tmp_path / "out") / "model.safetensors").stat().st_size
    assert 0 <= written - dense.num_bytes < 5_000
    assert {each.verdict.status for each in survey(make_source("llama")) if each.target.name == "dense"} == {"kept"}
    convert(make_source("llama"), tmp_path / "mixed", {"mixers": [{"type": "retention", "depths": [1]}]})
    (dense,) = (each for each in survey(tmp_path / "mixed") if each.target.name == "dense")
    assert dense.verdict.status == "impossible"
    assert dense.verdict.reasons == ("attention at every depth (got depth 1: retention)",)
    assert dense.verdict.changes == ("no mixers",)
    with pytest.raises(ExportError, match=r"dense cannot hold this model: .*; it would with no mixers; see"):
        export(tmp_path / "mixed", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_an_unknown_engine_is_refused():
    with pytest.raises(ExportError, match=r"for: must be one of .*got 'vlm'.*did you mean 'vllm'"):
        targets_for("vlm")


def test_the_survey_says_that_integers_become_floats(folded: Path, tmp_path: Path):
    quantise(folded, tmp_path / "small", "int4")
    found = {each.target.name: each for each in survey(tmp_path / "small")}
    assert found["nanbeige"].verdict.status == "larger"
    assert found["nanbeige"].verdict.reasons[0] == "integers become floats"
    assert found["nanbeige"].share is not None
    assert found["nanbeige"].share > 1.5
    floats = {each.target.name: each.num_bytes for each in survey(folded)}
    assert found["nanbeige"].num_bytes == floats["nanbeige"]
    for name in ("onnx", "gguf", "hub"):
        assert found[name].verdict.status == "kept"
        size, whole = found[name].num_bytes, floats[name]
        assert size is not None
        assert whole is not None
        assert size < whole
