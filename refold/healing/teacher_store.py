"""A store on disk of a teacher's likeliest tokens at every position of a stage's data."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from refold.checkpoint.atomic_file import write_json
from refold.data.packing import Sequences
from refold.errors import FolderError, HealError
from refold.healing.activations import Activations
from refold.scoring.stored import StoredPredictions, likeliest

_FORMAT = 1
_SAVE_SECONDS = 30.0
_ROWS, _FACTS = "predictions.bin", "predictions.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@runtime_checkable
class RunningTeacher(Protocol):
    """A teacher in memory."""

    def observe(self, input_ids: Tensor, position_ids: Tensor, /) -> Activations:
        """Returns the activations of a pass over some sequences, with the predictions."""
        ...


@dataclass(frozen=True)
class TeacherPass:
    """Describes the pass of a teacher over the data of a stage.

    Attributes:
        make_teacher: returns the teacher; called only if predictions are missing.
        data: the sequences.
        micro_batch: sequences of one forward pass.
        device: the teacher's device.
    """

    make_teacher: Callable[[], RunningTeacher]
    data: Sequences
    micro_batch: int
    device: torch.device


@dataclass(frozen=True)
class StoreContents:
    """Describes the contents of a store.

    Attributes:
        identity: teacher, data and precision, as text. Stored predictions of another identity are not reused.
        first_sequence: position of the first sequence.
        num_sequences: number of sequences.
        context: tokens of one sequence.
        k: likeliest tokens stored for each position, 1 to `vocab_size`.
        vocab_size: vocabulary size of the teacher.
    """

    identity: str
    first_sequence: int
    num_sequences: int
    context: int
    k: int
    vocab_size: int

    @property
    def record(self) -> np.dtype:
        """Returns the dtype of one sequence on disk."""
        ids = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        per_token = (self.context, self.k)
        fields = [("ids", ids, per_token), ("log_probabilities", np.float16, per_token)]
        return np.dtype([*fields, ("log_tail", np.float16, (self.context,))])

    @property
    def num_bytes(self) -> int:
        """Returns the size on disk: `4 k + 2` bytes a token, `6 k + 2` with a vocabulary above 65,536."""
        return self.record.itemsize * self.num_sequences


class TeacherStore:
    """Reads the top-k predictions of a range of sequences from one memory-mapped file.

    Args:
        folder: folder written by `build`.
        contents: required contents.

    Raises:
        FolderError: the folder has no complete store with these contents.
    """

    def __init__(self, folder: Path, contents: StoreContents):
        self.contents = contents
        path = folder / _ROWS
        if _num_done(folder, contents) != contents.num_sequences:
            raise FolderError(
                f"{folder}: whole predictions of the teacher are required (not there); start the run again"
            )
        size = path.stat().st_size if path.exists() else 0
        if size != contents.num_bytes:
            raise FolderError(
                f"{path}: a file of {contents.num_bytes} bytes is required (got {size}); delete it and start again"
            )
        self._rows: Any = np.memmap(path, dtype=contents.record, mode="r", shape=(contents.num_sequences,))

    @classmethod
    def build(
        cls,
        folder: Path,
        contents: StoreContents,
        teacher_pass: TeacherPass,
        *,
        tell: Callable[[str], None] = lambda line: None,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> "TeacherStore":
        """Runs the teacher over the data and stores its predictions, unless the store is complete.

        An unfinished store with the same contents is continued from its last save; a store with other contents is
        deleted.

        Args:
            folder: folder of the store.
            contents: contents of the store.
            teacher_pass: the teacher and its data.
            tell: called with a line about the size on disk before the store is written.
            on_progress: called with the number of stored sequences.

        Raises:
            HealError: the vocabulary has fewer than k tokens, or the teacher has another vocabulary.
            FolderError: the disk is full or cannot be written.
        """
        k, vocab_size = contents.k, contents.vocab_size
        if not 1 <= k <= vocab_size:
            raise HealError(
                f"distil.top_k: 1 to the vocabulary's {vocab_size} tokens are required (got {k}); take fewer"
            )
        try:
            done = _resume(folder, contents)
            if done < contents.num_sequences:
                num_tokens = contents.num_sequences * contents.context
                tell(f"storing the teacher's {k} likeliest of {num_tokens:,} tokens: {contents.num_bytes:,} bytes")
                _require_space(folder, contents.num_bytes - done * contents.record.itemsize)
                with (folder / _ROWS).open("r+b") as file:
                    file.truncate(done * contents.record.itemsize)
                    file.seek(0, os.SEEK_END)
                    note = _Notes(file, folder, contents)
                    _write(file, contents, done, teacher_pass, note, on_progress)
        except OSError as error:
            if error.errno in _FULL:
                raise FolderError(
                    f"{folder}: the disk is full; make room and start again, it goes on from here"
                ) from None
            raise FolderError(f"{folder}: a folder that can be written is required ({error.strerror})") from None
        return cls(folder, contents)

    def read(self, position: int, count: int, /) -> StoredPredictions:
        """Returns the predictions of sequences `position .. position + count - 1`, `[B, T, k]`, float32 on the CPU.

        Raises:
            HealError: a sequence is not in the store.
        """
        begins = self.contents.first_sequence
        first = position - begins
        if first < 0 or first + count > self.contents.num_sequences:
            raise HealError(
                f"teacher: predictions of sequences {position} to {position + count - 1} are required (stored are "
                f"{begins} to {begins + self.contents.num_sequences - 1}); start the run again"
            )
        rows = self._rows[first : first + count]
        return StoredPredictions(
            torch.from_numpy(rows["ids"].astype(np.int64)),
            torch.from_numpy(rows["log_probabilities"].astype(np.float32)),
            torch.from_numpy(rows["log_tail"].astype(np.float32)),
        )


class _Notes:
    """Records the number of sequences on disk at intervals, so that a killed build can continue."""

    def __init__(self, file: IO[bytes], folder: Path, contents: StoreContents):
        self._file, self._folder, self._contents = file, folder, contents
        self._noted_at = time.monotonic()

    def __call__(self, done: int) -> None:
        is_whole = done == self._contents.num_sequences
        if is_whole or time.monotonic() - self._noted_at >= _SAVE_SECONDS:
            self._file.flush()
            os.fsync(self._file.fileno())
            _write_facts(self._folder, self._contents, done)
            self._noted_at = time.monotonic()


def _write(
    file: IO[bytes],
    contents: StoreContents,
    done: int,
    teacher_pass: TeacherPass,
    note: Callable[[int], None],
    on_progress: Callable[[int], None],
) -> None:
    """Appends the predictions of the missing sequences."""
    teacher, device = teacher_pass.make_teacher(), teacher_pass.device
    while done < contents.num_sequences:
        count = min(teacher_pass.micro_batch, contents.num_sequences - done)
        batch = teacher_pass.data.batch(contents.first_sequence + done, count)
        predictions = teacher.observe(batch.input_ids.to(device), batch.position_ids.to(device)).predictions
        if predictions.head.vocab_size != contents.vocab_size:
            raise HealError(
                f"teacher: a vocabulary of {contents.vocab_size} tokens is required (got "
                f"{predictions.head.vocab_size}); take a teacher that shares the student's tokenizer"
            )
        found = likeliest(predictions, contents.k)
        rows = np.empty(count, dtype=contents.record)
        for name, part in found._asdict().items():
            rows[name] = part.cpu().numpy()
        file.write(rows.tobytes())
        done += count
        note(done)
        on_progress(done)


def _resume(folder: Path, contents: StoreContents) -> int:
    """Returns the number of stored sequences; deletes a store with other contents."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / _ROWS
    done = _num_done(folder, contents)
    if done is not None and rows.exists() and rows.stat().st_size >= done * contents.record.itemsize:
        return done
    (folder / _FACTS).unlink(missing_ok=True)
    rows.write_bytes(b"")
    return 0


def _num_done(folder: Path, contents: StoreContents) -> int | None:
    """Returns the recorded number of sequences; None if there is no record or the store has other contents."""
    try:
        facts = json.loads((folder / _FACTS).read_text())
    except (FileNotFoundError, ValueError):
        return None
    done = facts.pop("done", None) if isinstance(facts, dict) else None
    return done if facts == {"format": _FORMAT, **asdict(contents)} else None


def _write_facts(folder: Path, contents: StoreContents, done: int) -> None:
    write_json(folder / _FACTS, {"format": _FORMAT, **asdict(contents), "done": done})


def _require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise FolderError(
            f"{folder}: {num_bytes} bytes of disk are required for the teacher's predictions (free: {free}); make "
            f"room, or take a smaller top_k"
        )
