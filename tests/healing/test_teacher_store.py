"""Stored predictions of a teacher: complete, resumable, and refused for another teacher."""

import json
import shutil
from collections import namedtuple
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from refold.data.packing import PackedSequence, PackedSequences
from refold.errors import FolderError, HealError
from refold.healing import teacher_store
from refold.healing.activations import Activations
from refold.healing.teacher_store import StoreContents, TeacherPass, TeacherStore
from refold.scoring.head import Head, Predictions

VOCAB, CONTEXT, FIRST, COUNT = 50, 8, 3, 7
CONTENTS = StoreContents("a teacher and its data", FIRST, COUNT, CONTEXT, 5, VOCAB)


@dataclass
class Teacher:
    """Predicts from the token and its position; may be stopped after some passes."""

    vocab_size: int = VOCAB
    fails_after: int = 10**9
    passes: list[int] = field(default_factory=list)

    def observe(self, input_ids: Tensor, position_ids: Tensor, /) -> Activations:
        if len(self.passes) == self.fails_after:
            raise KeyboardInterrupt
        self.passes.append(len(input_ids))
        generator = torch.Generator().manual_seed(0)
        embedding = torch.randn(VOCAB + CONTEXT, 6, generator=generator)
        weight = torch.randn(self.vocab_size, 6, generator=generator)
        return Activations(Predictions(embedding[input_ids] + embedding[VOCAB + position_ids], Head(weight)))


def make_data() -> PackedSequences:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 100, dtype=np.uint16)
    return PackedSequences(tokens, np.array([0, 30, 37, 100]), CONTEXT, seed=0)


@pytest.fixture
def build(tmp_path: Path):
    def run(contents: StoreContents = CONTENTS, teacher: Any = None, **options: Any) -> TeacherStore:
        whole = TeacherPass(lambda: teacher or Teacher(), make_data(), micro_batch=2, device=torch.device("cpu"))
        return TeacherStore.build(tmp_path / "store", contents, whole, **options)

    return run


def expected(position: int, count: int, k: int = 5) -> tuple[Tensor, Tensor]:
    batch = make_data().batch(position, count)
    predictions = Teacher().observe(batch.input_ids, batch.position_ids).predictions
    top, ids = predictions.head.logits(predictions.hidden).log_softmax(-1).topk(k)
    return top, ids


def test_what_is_read_is_what_the_teacher_predicts_there(build):
    store = build()
    for position, count in ((FIRST, 1), (FIRST + 2, 3), (FIRST, COUNT)):
        found = store.read(position, count)
        top, ids = expected(position, count)
        assert found.ids.dtype == torch.int64
        assert torch.equal(found.ids, ids)
        torch.testing.assert_close(found.log_probabilities, top, rtol=2**-11, atol=0)
        torch.testing.assert_close(found.log_tail, (1 - top.exp().sum(-1)).log(), rtol=2**-10, atol=1e-4)
    assert not torch.equal(store.read(FIRST, 1).ids, store.read(FIRST + 1, 1).ids)


@pytest.mark.parametrize(("vocab_size", "bytes_per_id"), [(VOCAB, 2), (2**16, 2), (2**16 + 1, 4)])
def test_its_size_is_known_beforehand(build, tmp_path, vocab_size, bytes_per_id):
    contents = replace(CONTENTS, vocab_size=vocab_size)
    assert contents.num_bytes == COUNT * CONTEXT * (5 * (2 + bytes_per_id) + 2)
    lines: list[str] = []
    found = build(contents, Teacher(vocab_size), tell=lines.append).read(FIRST, COUNT)
    assert (tmp_path / "store" / "predictions.bin").stat().st_size == contents.num_bytes
    assert lines == [f"storing the teacher's 5 likeliest of {COUNT * CONTEXT} tokens: {contents.num_bytes:,} bytes"]
    assert int(found.ids.max()) > (2**15 if vocab_size > 2**15 else 0)


def test_a_whole_store_is_not_built_again(build, tmp_path):
    first = build().read(FIRST, COUNT)
    lines: list[str] = []

    def make_teacher() -> Teacher:
        raise AssertionError("no teacher is needed")

    store = TeacherStore.build(
        tmp_path / "store",
        CONTENTS,
        TeacherPass(make_teacher, make_data(), micro_batch=2, device=torch.device("cpu")),
        tell=lines.append,
    )
    assert lines == []
    assert all(torch.equal(one, other) for one, other in zip(store.read(FIRST, COUNT), first, strict=True))


@pytest.mark.parametrize("stops_after", [0, 1, 3])
def test_an_unfinished_build_goes_on(build, monkeypatch, stops_after):
    monkeypatch.setattr(teacher_store, "_SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        build(teacher=Teacher(fails_after=stops_after))
    teacher, done = Teacher(), []
    found = build(teacher=teacher, on_progress=done.append).read(FIRST, COUNT)
    assert sum(teacher.passes) == COUNT - 2 * stops_after
    assert done == [*range(2 * stops_after + 2, COUNT, 2), COUNT]
    assert torch.equal(found.ids, expected(FIRST, COUNT)[1])


def test_what_was_written_after_the_last_note_is_written_again(build, monkeypatch, tmp_path):
    monkeypatch.setattr(teacher_store, "_SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        build(teacher=Teacher(fails_after=2))
    with (tmp_path / "store" / "predictions.bin").open("ab") as file:
        file.write(b"half a sequence")
    assert torch.equal(build().read(FIRST, COUNT).ids, expected(FIRST, COUNT)[1])


@pytest.mark.parametrize("size", [0, 100])
def test_a_file_shorter_than_noted_is_made_anew(build, tmp_path, size):
    build()
    path = tmp_path / "store" / "predictions.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FolderError, match=rf"predictions.bin: a file of {CONTENTS.num_bytes} bytes .* \(got {size}\)"):
        TeacherStore(path.parent, CONTENTS)
    teacher = Teacher()
    assert torch.equal(build(teacher=teacher).read(FIRST, COUNT).ids, expected(FIRST, COUNT)[1])
    assert sum(teacher.passes) == COUNT


@pytest.mark.parametrize("change", [{"identity": "another"}, {"first_sequence": 4}, {"k": 4}, {"num_sequences": 5}])
def test_a_store_of_something_else_is_replaced(build, tmp_path, change):
    build()
    other = replace(CONTENTS, **change)
    with pytest.raises(FolderError, match=r"whole predictions of the teacher are required \(not there\)"):
        TeacherStore(tmp_path / "store", other)
    teacher = Teacher()
    found = build(other, teacher).read(other.first_sequence, 5)
    assert sum(teacher.passes) == other.num_sequences
    assert torch.equal(found.ids, expected(other.first_sequence, 5, other.k)[1])


def test_broken_notes_are_no_notes(build, tmp_path):
    build()
    (tmp_path / "store" / "predictions.json").write_text('{"format": 1, "identi')
    teacher = Teacher()
    build(teacher=teacher)
    assert sum(teacher.passes) == COUNT
    assert json.loads((tmp_path / "store" / "predictions.json").read_text())["done"] == COUNT


@pytest.mark.parametrize(("position", "count"), [(FIRST - 1, 1), (FIRST, COUNT + 1), (FIRST + COUNT, 1)])
def test_what_is_not_stored_is_refused(build, position, count):
    last = position + count - 1
    with pytest.raises(HealError, match=rf"of sequences {position} to {last} are required \(stored are 3 to 9\)"):
        build().read(position, count)


@pytest.mark.parametrize("k", [0, VOCAB + 1])
def test_more_tokens_than_there_are_are_refused(build, k):
    with pytest.raises(HealError, match=rf"distil.top_k: 1 to the vocabulary's {VOCAB} tokens .* \(got {k}\)"):
        build(replace(CONTENTS, k=k))


def test_a_teacher_with_another_vocabulary_is_refused(build):
    with pytest.raises(HealError, match=rf"teacher: a vocabulary of {VOCAB} tokens is required \(got 60\)"):
        build(teacher=Teacher(vocab_size=60))


def test_too_small_a_disk_is_refused_before_the_teacher_is_loaded(build, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(CONTENTS.num_bytes - 1))
    needed = CONTENTS.num_bytes
    with pytest.raises(FolderError, match=rf"{needed} bytes of disk are required .* \(free: {needed - 1}\)"):
        build(teacher=Teacher(fails_after=0))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(CONTENTS.num_bytes))
    build()


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match=r"file.store: a folder that can be written is required \(Not a directory\)"):
        TeacherStore.build(
            tmp_path / "file" / "store", CONTENTS, TeacherPass(Teacher, make_data(), 2, torch.device("cpu"))
        )


def test_a_disk_that_fills_up_says_so(build, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_store, "_write", full)
    with pytest.raises(FolderError, match=r"the disk is full; make room and start again, it goes on from here"):
        build()


def test_data_is_asked_for_by_position(tmp_path):
    class Counting:
        asked: list[tuple[int, int]] = []  # noqa: RUF012

        def batch(self, position: int, count: int, /) -> PackedSequence:
            self.asked.append((position, count))
            return make_data().batch(position, count)

    data = Counting()
    TeacherStore.build(tmp_path, CONTENTS, TeacherPass(Teacher, data, micro_batch=4, device=torch.device("cpu")))
    assert data.asked == [(3, 4), (7, 3)]
