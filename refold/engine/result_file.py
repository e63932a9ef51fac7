"""Files of results: JSON lines in the order of completion, which a later run of the same prompts continues."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from refold.checkpoint.atomic_file import flush, require_free, write_json
from refold.checkpoint.lock import FolderLock
from refold.engine.results import Continuation, Result
from refold.errors import DataError, FolderError
from refold.suggest import shorten

FORMAT = 1
_START_ANEW = "choose another file, or start anew with --overwrite"


class ResultFile:
    """A file to which results are added, one a line, as a context manager that holds its lock.

    A file `NAME.run.json` beside it says which prompts, model and settings it belongs to.

    Args:
        path: The file. If it exists, the results in it are kept, and a torn last line is removed.
        run: Facts that must be equal for a run to continue the file, as plain data.
        num_prompts: Number of prompts.
        overwrite: Remove the results of an earlier run.

    Raises:
        FolderError: The file is another file, belongs to another run, is being written, or cannot be written.
        DataError: A line that is not the last is damaged.

    Attributes:
        finished: Numbers of the prompts with results.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any], num_prompts: int, overwrite: bool = False):
        self.path = Path(path)
        self.finished: set[int] = set()
        # As JSON gives it back: lists instead of tuples.
        self._run = json.loads(json.dumps({"refold_results": FORMAT, **run}))
        self._num_prompts, self._overwrite = num_prompts, overwrite
        require_results(self.path, overwrite)

    @property
    def facts_path(self) -> Path:
        """The file with the facts of the run."""
        return _facts_path(self.path)

    def __enter__(self) -> "ResultFile":
        self._make_parent()
        self._lock = FolderLock(self.path)
        self._lock.__enter__()
        try:
            self._file = self._open()
        except BaseException:
            self._lock.__exit__()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if self.finished:
                flush(self.path)
            else:
                # A run that failed before its first result leaves nothing behind.
                self.path.unlink()
                self.facts_path.unlink()
        finally:
            self._lock.__exit__()

    def add(self, result: Result, identity: str | int | None = None) -> None:
        """Adds a result, and gives it to the operating system at once.

        Raises:
            FolderError: The disk is full or failed.
        """
        line = {"index": result.index, **({} if identity is None else {"id": identity}), **_plain(result)}
        try:
            self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._file.flush()
        except OSError as error:
            raise FolderError(
                f"{self.path}: a writable place is required ({error.strerror}); make room there"
            ) from error
        self.finished.add(result.index)

    def _make_parent(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FolderError(f"{self.path}: a writable place is required ({error.strerror}); choose one") from error

    def _open(self) -> BinaryIO:
        if self._overwrite or not self.path.exists():
            self.path.unlink(missing_ok=True)
            write_json(self.facts_path, self._run)
        else:
            self._require_same_run()
            self._read_finished()
        try:
            return open(self.path, "ab")
        except OSError as error:
            raise FolderError(f"{self.path}: a writable place is required ({error.strerror}); {_START_ANEW}") from error

    def _require_same_run(self) -> None:
        stored = _read_facts(self.path)
        assert stored is not None
        for name, value in self._run.items():
            if stored.get(name) != value:
                raise FolderError(
                    f"{self.path}: results of the same run are required ({name} was {shorten(stored.get(name))} and is "
                    f"{shorten(value)}); {_START_ANEW}"
                )

    def _read_finished(self) -> None:
        data = self.path.read_bytes()
        whole = 0
        lines = data.split(b"\n")
        for number, raw in enumerate(lines, start=1):
            is_last = number >= len(lines) - 1
            index = _read_index(raw) if number < len(lines) else None
            if index is None:
                if is_last:
                    break
                raise DataError(f"{self.path}:{number}: a result is required (got {shorten(raw)}); {_START_ANEW}")
            if index >= self._num_prompts:
                raise DataError(
                    f"{self.path}:{number}: index: must be below the number of prompts, {self._num_prompts} (got "
                    f"{index}); {_START_ANEW}"
                )
            self.finished.add(index)
            whole += len(raw) + 1
        if whole < len(data):
            os.truncate(self.path, whole)


def require_results(path: str | Path, overwrite: bool = False) -> None:
    """Checks that results can be written to a file: it is new, or holds results.

    Args:
        path: The file.
        overwrite: Results in it may be replaced; other files are never replaced.

    Raises:
        FolderError: The file is another file, or the place is not writable.
    """
    path = Path(path)
    if not overwrite and path.is_file() and _read_facts(path) is not None:
        return
    if not overwrite and path.is_file():
        raise FolderError(
            f"{path}: a new file, or results with {_facts_path(path).name} beside them, is required (got another "
            f"file); choose another name"
        )
    require_free(path, "file of results", lambda each: _read_facts(each) is not None, overwrite)


def _facts_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.run.json")


def _read_facts(path: Path) -> dict[str, Any] | None:
    """Returns the facts of the run that wrote a file of results; None for another file."""
    try:
        facts = json.loads(_facts_path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) and "refold_results" in facts else None


def _read_index(raw: bytes) -> int | None:
    """Returns the number of the prompt of a line; None for a damaged line."""
    try:
        index = json.loads(raw)["index"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return index if type(index) is int and index >= 0 else None


def _plain(result: Result) -> dict[str, Any]:
    return {
        "text": result.text,
        "prompt_tokens": len(result.prompt_ids),
        "cached_tokens": result.cached_tokens,
        "choices": [_plain_choice(choice) for choice in result.choices],
        "seconds": {name: round(value, 4) for name, value in result.seconds.items()},
        **({} if result.prompt_logprobs is None else {"prompt_logprobs": result.prompt_logprobs}),
    }


def _plain_choice(choice: Continuation) -> dict[str, Any]:
    """Returns a choice as plain data, without the fields that say nothing."""
    return {name: value for name, value in asdict(choice).items() if value is not None and value != ()}
