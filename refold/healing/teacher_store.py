"""A teacher's likeliest tokens at every position of a stage's data, written once and read from then on."""

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
        """Returns its pass over some sequences, predictions among it."""
        ...


@dataclass(frozen=True)
class StoreContents:
    """What a store holds.

    Attributes:
        identity: whatever else predictions depend on: teacher, data, precision.
        first_sequence: position of the first sequence.
        num_sequences: how many follow.
        context: tokens of each.
        k: tokens kept for each position, 1 to `vocab_size`.
        vocab_size: the teacher's.
    """

    identity: str
    first_sequence: int
    num_sequences: int
    context: int
    k: int
    vocab_size: int

    @property
    def record(self) -> np.dtype:
        """One sequence on disk."""
        ids = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        per_token = (self.context, self.k)
        fields = [("ids", ids, per_token), ("log_probabilities", np.float16, per_token)]
        return np.dtype([*fields, ("log_tail", np.float16, (self.context,))])

    @property
    def num_bytes(self) -> int:
        """Size on disk: `4 k + 2` bytes a token, `6 k + 2` with a vocabulary above 65,536."""
        return self.record.itemsize * self.num_sequences


class TeacherStore:
    """The top-k predictions of a range of sequences, in one memory-mapped file.

    Args:
        folder: as `build` left it.
        contents: what it must hold.

    Raises:
        FolderError: no such store is there, whole.
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
        make_teacher: Callable[[], RunningTeacher],
        data: Sequences,
        *,
        micro_batch: int,
        device: torch.device,
        tell: Callable[[str], None] = lambda line: None,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> "TeacherStore":
        """Runs the teacher over the data and stores what it predicts, unless that is done already.

        A build that ended early goes on from where it last saved; one of anything else is dropped.

        Args:
            folder: where the store is, or is to be.
            contents: what it is to hold.
            make_teacher: gives the teacher; called only where something is left to store.
            data: the sequences.
            micro_batch: sequences of one forward pass.
            device: where the teacher is.
            tell: gets a line on the disk it takes, before anything is written.
            on_progress: called with the number of sequences stored so far.

        Raises:
            HealError: there are fewer than k tokens, or the teacher's vocabulary is another.
            FolderError: the disk is too small, or cannot be written.
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
                    _write(file, contents, done, make_teacher(), data, micro_batch, device, note, on_progress)
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
            HealError: some are not stored.
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
    """Writes down how many sequences are on disk, so that a build that is killed goes on from there."""

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
    teacher: RunningTeacher,
    data: Sequences,
    micro_batch: int,
    device: torch.device,
    note: Callable[[int], None],
    on_progress: Callable[[int], None],
) -> None:
    """Appends the sequences that are missing."""
    while done < contents.num_sequences:
        count = min(micro_batch, contents.num_sequences - done)
        batch = data.batch(contents.first_sequence + done, count)
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
    """Returns how many sequences are there already; drops those of another store."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / _ROWS
    done = _num_done(folder, contents)
    if done is not None and rows.exists() and rows.stat().st_size >= done * contents.record.itemsize:
        return done
    (folder / _FACTS).unlink(missing_ok=True)
    rows.write_bytes(b"")
    return 0


def _num_done(folder: Path, contents: StoreContents) -> int | None:
    """How many sequences were noted as stored; None where the store is of something else, or nothing is noted."""
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
