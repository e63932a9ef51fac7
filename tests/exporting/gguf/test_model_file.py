"""GGUF files as outputs: their place, their provenance, and the package that writes them."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from refold.checkpoint import provenance
from refold.checkpoint.manifest import verify
from refold.conversion.convert import convert
from refold.errors import ExportError, FolderError
from refold.exporting.export import export, write_export
from refold.exporting.target import ExportOptions
from refold.exporting.targets.gguf import GGUF

gguf = pytest.importorskip("gguf")


def _fields(file: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_a_folder_has_the_file_card_provenance_and_tokenizer(make_named, tmp_path):
    source = make_named("llama")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    out = export(source, tmp_path / "out", "gguf")
    assert verify(out) == ()
    assert {"model.gguf", "README.md", "provenance.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "llama.cpp's architecture llama, matrices in f32" in card
    fields = _fields(out / "model.gguf")
    assert fields["general.license"] == "mit"
    assert fields["general.name"] == source.name
    assert "refold.provenance" not in fields
    assert [stage.stage for stage in provenance.read(out)] == ["export"]


def test_one_file_holds_its_provenance(make_named, tmp_path):
    convert(make_named("llama"), tmp_path / "folded", {"fold": {"loops": 2}})
    said: list[str] = []
    options = ExportOptions(quantise="q8_0")
    out = write_export(tmp_path / "folded", tmp_path / "a.gguf", GGUF, options, False, "refold export", said.append)
    stages = json.loads(_fields(out)["refold.provenance"])
    assert [stage["stage"] for stage in stages] == ["convert", "export"]
    assert stages[1]["recipe"] == {"to": "gguf", "dtype": "float32", "quantise": "q8_0"}
    assert stages[1]["command"] == "refold export"
    assert said[0] == "llama.cpp's architecture nanbeige, matrices in q8_0"
    assert "stored in f16 instead of q8_0" in said[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "folded"]


def test_only_a_file_of_refold_is_overwritten_and_only_when_asked(make_named, tmp_path):
    source, out = make_named("llama"), tmp_path / "model.gguf"
    export(source, out, "gguf")
    with pytest.raises(FolderError, match=r"a new file is required .it exists.; choose another or pass --overwrite"):
        export(source, out, "gguf")
    export(source, out, "gguf", overwrite=True)
    out.write_bytes(b"GGUF of somebody else")
    with pytest.raises(FolderError, match=r"a .gguf file of refold is required to be overwritten .got another file."):
        export(source, out, "gguf", overwrite=True)
    assert out.read_bytes() == b"GGUF of somebody else"
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(FolderError, match=r"a file name is required .got a folder."):
        export(source, tmp_path / "folder.gguf", "gguf")


def test_a_failure_leaves_no_file(make_named, tmp_path, monkeypatch):
    from refold.exporting.gguf import file_writer

    monkeypatch.setattr(file_writer, "compute_tensor", lambda *rest: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(FolderError, match=r"no space"):
        export(make_named("llama"), tmp_path / "model.gguf", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_noticed_before_any_work(make_named, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    with pytest.raises(FolderError, match=r"model.gguf: \d+ bytes of disk are required .free: 1000."):
        export(make_named("llama"), tmp_path / "model.gguf", "gguf")


def test_without_the_package_the_extra_is_named(make_named, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r"the package gguf is required .not installed.; pip install 'refold.gguf.'"):
        export(make_named("llama"), tmp_path / "model.gguf", "gguf")


def test_windows_and_phi3_names(make_named, tmp_path):
    said: list[str] = []
    source = make_named("mistral-window", hidden_act="silu").rename(tmp_path / "my-phi3")
    out = write_export(source, tmp_path / "a.gguf", GGUF, ExportOptions(), report=said.append)
    fields = _fields(out)
    assert fields["llama.context_length"] == 8
    assert any("the context length is 8 tokens instead of 256" in sentence for sentence in said)
    assert "general.name" not in fields, "llama.cpp would look for Phi-3's tokens"
