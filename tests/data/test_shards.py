import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refold.data import shards as shard_writer
from refold.data.encoder import EncodedDocument
from refold.data.shards import ShardWriter, TokenShards, cached
from refold.errors import DataError

LENGTHS = [3, 0, 1, 17, 5, 40, 2]


def _documents(has_targets: bool) -> list[EncodedDocument]:
    random = np.random.default_rng(0)
    return [
        EncodedDocument(
            random.integers(0, 300, size).astype(np.uint16), random.random(size) < 0.5 if has_targets else None, size
        )
        for size in LENGTHS
    ]


def _write(folder: Path, has_targets: bool = False) -> list[EncodedDocument]:
    documents = _documents(has_targets)
    with ShardWriter(folder, np.dtype(np.uint16), has_targets, "books") as writer:
        for document in documents:
            writer.add(document)
    return documents


@pytest.mark.parametrize("has_targets", [False, True])
@pytest.mark.parametrize("shard_tokens", [1, 7, 17, 68, 1000])
def test_shards_give_back_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_targets: bool, shard_tokens: int
):
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", shard_tokens)
    documents = _write(tmp_path / "a", has_targets)
    shards = TokenShards(tmp_path / "a")
    tokens = np.concatenate([document.ids for document in documents])
    assert len(shards.index.shards) == -(-len(tokens) // shard_tokens)
    assert (shards.index.num_tokens, shards.index.largest_token) == (len(tokens), tokens.max())
    assert shards.offsets.tolist() == np.cumsum([0, *(size for size in LENGTHS if size)]).tolist()
    parts = [document.is_target for document in documents if document.is_target is not None]
    targets = np.concatenate(parts) if has_targets else None
    for start in range(len(tokens) + 1):
        for stop in (start, start + 1, start + 9, len(tokens), len(tokens) + 5):
            assert np.array_equal(shards.tokens[start:stop], tokens[start:stop])
            if targets is not None:
                assert shards.is_target is not None
                assert np.array_equal(shards.is_target[start:stop], targets[start:stop])
    assert [name for name in os.listdir(tmp_path) if name != "a"] == []


def test_the_digest_is_of_the_contents(tmp_path: Path):
    for name, has_targets in (("a", True), ("b", True), ("c", False)):
        _write(tmp_path / name, has_targets)
    one, two, other = (TokenShards(tmp_path / name).index.sha256 for name in "abc")
    assert one == two != other


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path):
    def fail() -> None:
        with ShardWriter(tmp_path / "a", np.dtype(np.uint16), False, "books") as writer:
            writer.add(_documents(False)[0])
            assert os.listdir(tmp_path) == [".a.unfinished"]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_removed(tmp_path: Path):
    (tmp_path / ".a.unfinished").mkdir()
    (tmp_path / ".a.unfinished" / "tokens-00009.bin").write_bytes(b"x")
    _write(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
    assert not (tmp_path / "a" / "tokens-00009.bin").exists()


def test_no_documents_are_an_error(tmp_path: Path):
    with (
        pytest.raises(DataError, match=r"one document that is not empty is required \(got none in books\)"),
        ShardWriter(tmp_path / "a", np.dtype(np.uint16), False, "books") as writer,
    ):
        writer.add(_documents(False)[1])
    assert os.listdir(tmp_path) == []


def _truncate(folder: Path, name: str) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate((folder / name).stat().st_size - 1)


def _set(folder: Path, **fields: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **fields}))


@pytest.mark.parametrize(
    ("tear", "message"),
    [
        (lambda folder: _truncate(folder, "tokens-00000.bin"), r"tokens-00000\.bin has 135 bytes, not 136"),
        (lambda folder: _truncate(folder, "targets-00000.bin"), r"targets-00000\.bin has 67 bytes, not 68"),
        (lambda folder: _truncate(folder, "offsets.bin"), r"offsets\.bin has 55 bytes, not 56"),
        (lambda folder: (folder / "tokens-00000.bin").unlink(), r"tokens-00000\.bin: No such file"),
        (lambda folder: (folder / "index.json").unlink(), r"index\.json: No such file"),
        (lambda folder: _truncate(folder, "index.json") or _truncate(folder, "index.json"), "is not an index"),
        (lambda folder: _set(folder, format="refold-shards-0"), "is not an index of format refold-shards-1"),
        (lambda folder: _set(folder, what=1), "is not an index"),
        (lambda folder: (folder / "offsets.bin").write_bytes(bytes(56)), "offsets.bin does not fit the tokens"),
    ],
)
def test_a_torn_folder_is_refused(tmp_path: Path, tear: Any, message: str):
    _write(tmp_path / "a", has_targets=True)
    tear(tmp_path / "a")
    with pytest.raises(
        DataError, match=rf"a: a whole token cache is required \(.*{message}.*; delete it to make it anew"
    ):
        cached(tmp_path / "a", lambda: pytest.fail("a torn folder is not written over"))


def test_tokens_above_the_vocabulary_are_refused(tmp_path: Path):
    _write(tmp_path / "a")
    shards = TokenShards(tmp_path / "a")
    largest = shards.index.largest_token
    shards.require_vocabulary(None)
    shards.require_vocabulary(largest + 1)
    with pytest.raises(DataError, match=rf"books: tokens below the model's {largest} are required \(got {largest}\)"):
        shards.require_vocabulary(largest)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/b: the token cache must be writable \(Not a directory\)"):
        cached(tmp_path / "file" / "b" / "a", lambda: None)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"a: the token cache must be writable \(No space left on device\); free space"):
        _write(tmp_path / "a")
    assert os.listdir(tmp_path) == ["file"]
