import hashlib
import json
import os
from pathlib import Path

import pytest

from refold.checkpoint.manifest import (
    MANIFEST_NAME,
    check,
    content_hash,
    hash_file,
    is_refold_folder,
    verify,
    write_manifest,
)
from refold.errors import FolderError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.jinja").write_text("t")
    write_manifest(tmp_path)
    return tmp_path


def test_every_file_is_listed_with_size_and_hash(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert set(manifest["files"]) == {"config.json", "weights", "README.md", "sub/x.jinja"}
    content = (folder / "weights").read_bytes()
    assert manifest["files"]["weights"] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert hash_file(folder / "weights") == hashlib.sha256(content).hexdigest()
    check(folder)
    assert verify(folder) == ()
    assert is_refold_folder(folder)


def test_known_hashes_are_taken_and_unknown_files_refused(folder: Path) -> None:
    write_manifest(folder, {"weights": "f" * 64})
    assert json.loads((folder / "manifest.json").read_text())["files"]["weights"]["sha256"] == "f" * 64
    with pytest.raises(FolderError, match=r"a file is required for each known hash \(missing: gone\)"):
        write_manifest(folder, {"gone": "f" * 64})


def test_a_bit_flip_is_found_by_verify_alone(folder: Path) -> None:
    content = bytearray((folder / "weights").read_bytes())
    content[777_777] ^= 1
    (folder / "weights").write_bytes(bytes(content))
    check(folder)
    with pytest.raises(FolderError, match=r"required unchanged \(got weights \(content differs from its sha256\)\)"):
        verify(folder)


def test_all_bad_files_are_named(folder: Path) -> None:
    (folder / "config.json").write_text("{ }")
    (folder / "weights").unlink()
    for function in (check, verify):
        with pytest.raises(FolderError, match=r"config\.json \(3 bytes instead of 2\), weights \(missing\)"):
            function(folder)


def test_an_edited_card_loads_and_is_named_by_verify(folder: Path) -> None:
    (folder / "README.md").write_text("another card")
    check(folder)
    with pytest.raises(FolderError, match=r"README\.md \(12 bytes instead of 4\)"):
        verify(folder)


def test_extra_files_are_allowed_and_named(folder: Path) -> None:
    (folder / "evaluation.json").write_text("{}")
    check(folder)
    assert verify(folder) == ("evaluation.json",)


def test_verify_tells_its_progress(folder: Path) -> None:
    counts: list[int] = []
    verify(folder, counts.append)
    assert (
        sum(counts)
        == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        - (folder / "manifest.json").stat().st_size
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"manifest\.json is required \(missing: not a refold folder, or a torn one\)"),
        ("{", "readable JSON is required"),
        ("[]", "manifest format 1 is required .got list"),
        ('{"format": 2}', "manifest format 1 is required .got 2"),
        ('{"format": 1, "files": []}', "`files` with bytes and sha256 of each is required"),
        ('{"format": 1, "files": {"a": 1}}', "`files` with bytes and sha256 of each is required"),
        ('{"format": 1, "files": {"../a": {"bytes": 1, "sha256": ""}}}', "`files` with bytes and sha256 of each"),
    ],
)
def test_bad_manifest(folder: Path, content: str | None, message: str) -> None:
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_text(content)
    assert not is_refold_folder(folder)
    for function in (check, verify):
        with pytest.raises(FolderError, match=message):
            function(folder)


def test_a_file_that_cannot_be_hashed(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="gone: cannot be read"):
        hash_file(tmp_path / "gone")


def test_a_file_the_manifest_knows_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hash_file(folder / "weights")
    monkeypatch.setattr("refold.checkpoint.manifest.hash_file", lambda path: f"read {path.name}")
    assert content_hash(folder / "weights") == expected
    (folder / "new").write_text("not listed")
    assert content_hash(folder / "new") == "read new"
    (folder / "config.json").write_text("{ }")
    assert content_hash(folder / "config.json") == "read config.json"
    (folder / "manifest.json").unlink()
    assert content_hash(folder / "weights") == "read weights"


def test_a_file_changed_after_its_manifest_has_another_hash(folder: Path) -> None:
    before = content_hash(folder / "weights")
    content = bytearray((folder / "weights").read_bytes())
    content[-1] ^= 1
    (folder / "weights").write_bytes(content)
    written = (folder / "manifest.json").stat().st_mtime_ns
    os.utime(folder / "weights", ns=(written + 1, written + 1))
    assert content_hash(folder / "weights") == hash_file(folder / "weights") != before


def test_a_file_that_is_not_there_has_no_hash(folder: Path) -> None:
    (folder / "weights").unlink()
    with pytest.raises(FolderError, match="weights: cannot be read"):
        content_hash(folder / "weights")


def test_a_manifest_that_lists_nothing_or_leaves_weights_out_does_not_verify(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "files": {}}))
    for examine in (check, verify):
        with pytest.raises(FolderError, match="`files` with bytes and sha256 of each is required"):
            examine(folder)
    path.write_text(json.dumps(manifest))
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(FolderError, match=r"model\.safetensors \(not listed\)"):
        verify(folder)
