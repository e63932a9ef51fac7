import json
import os
from pathlib import Path

import pytest

from refold.checkpoint.companions import check_companions, copy_companions, has_tokenizer, is_companion
from refold.errors import SourceError

TRAVEL = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENCE.md",
    "Notice",
    "COPYING",
    "USE_POLICY.md",
    "additional_chat_templates/tools.jinja",
]
STAY = [
    "config.json",
    "README.md",
    "model.safetensors",
    "pytorch_model.bin",
    "modeling_x.py",
    "license.py",
    "tokenizer.py",
    "notice.safetensors",
    "additional_chat_templates/run.py",
    "original/tokenizer.model",
]


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content(name))


def content(name: str) -> str:
    return json.dumps({"file": name})


def test_what_travels_is_copied_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    fill(source, TRAVEL + STAY)
    target.mkdir()
    companions = copy_companions(source, target)
    assert set(companions.copied) == set(TRAVEL)
    assert companions.has_tokenizer
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert found == set(TRAVEL)
    assert all((target / name).read_text() == content(name) for name in TRAVEL)
    assert all(is_companion(name) for name in TRAVEL)
    assert not any(is_companion(name) for name in STAY)


def test_links_are_followed_to_their_content(tmp_path: Path) -> None:
    source, target = tmp_path / "snapshots" / "commit", tmp_path / "target"
    fill(tmp_path, ["blobs/abc"])
    source.mkdir(parents=True)
    target.mkdir()
    (tmp_path / "blobs" / "abc").chmod(0o600)
    (source / "tokenizer.json").symlink_to("../../blobs/abc")
    copy_companions(source, target)
    assert not (target / "tokenizer.json").is_symlink()
    assert (target / "tokenizer.json").read_text() == content("blobs/abc")
    assert (target / "tokenizer.json").stat().st_mode & 0o777 != 0o600


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "LICENSE").symlink_to("gone")
    with pytest.raises(SourceError, match=r"LICENSE: cannot be read .No such file"):
        copy_companions(tmp_path / "source", tmp_path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["tokenizer.json"], True),
        (["tokenizer.model"], True),
        (["vocab.json", "merges.txt"], True),
        (["vocab.json"], False),
        (["tokenizer_config.json", "LICENSE"], False),
        ([], False),
    ],
)
def test_a_tokenizer_is_a_vocabulary(tmp_path: Path, names: list[str], expected: bool) -> None:
    (tmp_path / "source").mkdir()
    fill(tmp_path / "source", names)
    assert has_tokenizer(names) is expected
    assert copy_companions(tmp_path / "source", tmp_path).has_tokenizer is expected


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "additional_chat_templates/a.jinja"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    fill(tmp_path, ["secret"])
    fill(source, [name])
    target.mkdir()
    (source / name).unlink()
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=rf"{name}: a file inside the model's folder is required \(it links to "):
        copy_companions(source, target)
    assert not (target / name).exists()


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "LICENSE")
    with pytest.raises(SourceError, match=r"LICENSE: cannot be read \(not a plain file"):
        check_companions(tmp_path)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "got list"), ("5", "got int"), ("[" * 200_000, "nested too deeply"), ("{", "Expecting")],
)
def test_a_companion_that_is_no_object_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=message):
        check_companions(tmp_path)
