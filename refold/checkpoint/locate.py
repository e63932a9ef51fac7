"""The place of a source: a local folder, or a repository of the hub."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from refold.checkpoint.folder import settle
from refold.checkpoint.headers import CheckpointHeaders, TensorInfo, collect_headers, read_header_bytes
from refold.checkpoint.manifest import content_hash, listed_hashes
from refold.checkpoint.other_folders import GGUF, explain_missing_config
from refold.checkpoint.source_file import open_file, parse_object, read_file
from refold.errors import SourceError

CONFIG_NAME = "config.json"
PLAN_NAME = "plan.json"
Fingerprint = Mapping[str, str | None]
"""Hashes that differ between sources, and after a change of a source; None: not known."""
_SAMPLE_BYTES = 4096
"""Bytes from the middle of each tensor that the fingerprint covers."""
_BLOCK_BYTES = 1 << 22
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^\s@]+))?")


class Source(ABC):
    """A source checkpoint, in a folder or on the hub.

    Attributes:
        path: Its folder; None on the hub.
        hub_id: Its `org/name`; None in a folder.
        revision: On the hub, the commit that was resolved.
        ignore_tensors: Pattern and reason of tensors that need no place when the source is loaded.
    """

    path: Path | None = None
    hub_id: str | None = None
    ignore_tensors: Sequence[tuple[str, str]] = ()

    @property
    def revision(self) -> str | None:
        return None

    @property
    @abstractmethod
    def where(self) -> str:
        """Name in messages and reports: the folder, or `org/name@commit`."""

    @abstractmethod
    def names(self) -> Collection[str]:
        """Returns the names of its files."""

    @abstractmethod
    def fetch(self) -> Path:
        """Returns a folder with weights, config, tokenizer and licence files; files on the hub are downloaded."""

    @abstractmethod
    def _read(self, name: str) -> bytes: ...

    @abstractmethod
    def _read_range(self, file: str, start: int, size: int) -> bytes: ...

    @abstractmethod
    def _read_headers(self, files: Sequence[str]) -> Iterable[tuple[bytes, int]]: ...

    def read_config(self) -> dict[str, Any]:
        """Returns the raw content of `config.json`.

        Raises:
            SourceError: The file is missing or not a JSON object.
        """
        if CONFIG_NAME not in self.names():
            raise SourceError(
                f"{self.where}: {CONFIG_NAME} is required ({explain_missing_config(self.names(), self.path)}"
            )
        return parse_object(self._read(CONFIG_NAME), f"{self.where}/{CONFIG_NAME}", "mend the file")

    def headers(self, *, config_only: bool = False) -> CheckpointHeaders | None:
        """Returns the checkpoint's headers; with `config_only`, None if there are no weights.

        Raises:
            SourceError: A shard is missing or damaged, or there are no safetensors weights.
        """
        if self._headers is None and not config_only:
            return collect_headers(self.where, self.names(), self._read, self._read_headers)
        return self._headers

    def fingerprint(self) -> dict[str, str | None]:
        """Returns the hashes that identify this source.

        `config_sha256` and `index_sha256` (of the index, or of a single file's header) are None if the file is missing.
        A folder also has, if known, `sample_sha256` (4 KiB from the middle of each tensor) and `files_sha256` (of the
        weight files' hashes, which a manifest of refold lists).
        """
        config = hashlib.sha256(self._read(CONFIG_NAME)).hexdigest() if CONFIG_NAME in self.names() else None
        index = self._headers.sha256 if self._headers else None
        return {"config_sha256": config, "index_sha256": index, **self._hash_data()}

    def _hash_data(self) -> dict[str, str | None]:
        """Returns `sample_sha256` and `files_sha256` if known; a commit of the hub needs neither."""
        return {}

    def hash_files(self) -> str | None:
        """Returns `files_sha256` by reading every weight file; None on the hub, whose commit identifies them."""
        return None

    def holds_same_data(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Tells whether two tensors have the same dtype, shape and bytes."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return all(
            self._read_range(one.file, one.start + start, size)
            == self._read_range(other.file, other.start + start, size)
            for start, size in self._compared_ranges(one.num_bytes)
        )

    def _compared_ranges(self, num_bytes: int) -> Iterable[tuple[int, int]]:
        """Returns start and size of the ranges that `holds_same_data` reads."""
        return ((start, min(_BLOCK_BYTES, num_bytes - start)) for start in range(0, num_bytes, _BLOCK_BYTES))

    @cached_property
    def _headers(self) -> CheckpointHeaders | None:
        return collect_headers(self.where, self.names(), self._read, self._read_headers, config_only=True)


class FolderSource(Source):
    """A source in a local folder."""

    def __init__(self, path: Path):
        self.path: Path = path

    @property
    def where(self) -> str:
        return str(self.path)

    def names(self) -> Collection[str]:
        try:
            return [path.name for path in self.path.iterdir()]
        except OSError as error:
            raise SourceError(f"{self.path}: a readable folder is required ({error.strerror}); check it") from None

    def fetch(self) -> Path:
        return self.path

    def _read(self, name: str) -> bytes:
        return read_file(self.path / name)

    def _read_range(self, file: str, start: int, size: int) -> bytes:
        with open_file(self.path / file) as opened:
            opened.seek(start)
            return opened.read(size)

    def _hash_data(self) -> dict[str, str | None]:
        if self._headers is None:
            return {}
        digest = hashlib.sha256()
        for file in self._headers.files:
            with open_file(self.path / file) as opened:
                for info in self._headers.tensors.values():
                    if info.file == file:
                        opened.seek(info.start + max(0, (info.num_bytes - _SAMPLE_BYTES) // 2))
                        digest.update(opened.read(min(_SAMPLE_BYTES, info.num_bytes)))
        hashes = listed_hashes(self.path, sorted(self._headers.files))
        found: dict[str, str | None] = {"sample_sha256": digest.hexdigest()}
        if hashes is not None:
            found["files_sha256"] = _join_hashes(hashes)
        return found

    def hash_files(self) -> str | None:
        headers = self.headers(config_only=True)
        return (
            None
            if headers is None
            else _join_hashes([content_hash(self.path / file) for file in sorted(headers.files)])
        )

    def _read_headers(self, files: Sequence[str]) -> Iterable[tuple[bytes, int]]:
        return (read_header_bytes(self.path / file) for file in files)


def _join_hashes(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def is_same_source(one: Fingerprint, other: Fingerprint) -> bool:
    """Tells whether two fingerprints may be of one source: all hashes that both have are equal."""
    return all(one[key] == other[key] for key in one.keys() & other.keys() if None not in (one[key], other[key]))


def locate(source: str | Path) -> Source:
    """Finds a source: an existing folder if there is one, else the repository `org/name[@revision]` of the hub.

    Raises:
        SourceError: There is no such folder and the text is no hub id, or the hub has no such repository.
        FolderError: The folder was written by refold and is torn.
    """
    text = str(source)
    if not text:
        raise SourceError("source: a folder or a hub id org/name[@revision] is required (got nothing); name one")
    path = settle(text)
    if path.is_dir():
        return FolderSource(path)
    if path.exists():
        got = GGUF.replace(";", ");", 1) if path.suffix.lower() == ".gguf" else "a file); give the folder it lies in"
        raise SourceError(f"{text}: a model folder is required (got {got}")
    match = _HUB_ID.fullmatch(text) if isinstance(source, str) else None
    if match is None:
        raise SourceError(
            f"{text}: a folder or hub id org/name[@revision] is required (no such folder); check the path"
        )
    # Imported only here, so that reading a folder never imports the hub's client.
    from refold.checkpoint.hub import HubSource

    return HubSource(match["id"], match["revision"])
