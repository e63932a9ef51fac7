"""The place of a source: a local folder, a GGUF file, or a repository of the hub."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from refold.checkpoint.folder import settle
from refold.checkpoint.gguf.shards import find_gguf, is_gguf
from refold.checkpoint.headers import CheckpointHeaders, TensorInfo, collect_headers, read_header_bytes
from refold.checkpoint.manifest import content_hash, listed_hashes
from refold.checkpoint.other_folders import explain_missing_config
from refold.checkpoint.source_file import open_file, parse_object, read_file, read_range
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
    """A source checkpoint: a folder, a GGUF file, or a repository of the hub.

    Attributes:
        path: Its folder or file; None on the hub.
        hub_id: Its `org/name`; None for a local source.
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
        """Name in messages and reports: the path, or `org/name@commit`."""

    @property
    def name(self) -> str:
        """Short name in model cards: the hub id, or the name of the folder or file."""
        return self.hub_id or (self.path.resolve().name if self.path is not None else self.where)

    @abstractmethod
    def fetch(self) -> Path:
        """Returns the local folder or GGUF file with the weights; files on the hub are downloaded."""

    @abstractmethod
    def fetch_companions(self) -> Path:
        """Returns a local folder with config, tokenizer and licence files."""

    @abstractmethod
    def read_config(self) -> dict[str, Any]:
        """Returns the content of `config.json`, as transformers has it.

        Raises:
            SourceError: There is none, or the file is damaged.
        """

    def headers(self, *, config_only: bool = False) -> CheckpointHeaders | None:
        """Returns the checkpoint's headers; with `config_only`, None if there are no weights.

        Raises:
            SourceError: A shard is missing or damaged, or there are no safetensors weights.
        """
        return self._headers

    @abstractmethod
    def fingerprint(self) -> dict[str, str | None]:
        """Returns the hashes that identify this source: those of `SourceRecord` that are known."""

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

    @property
    @abstractmethod
    def _headers(self) -> CheckpointHeaders | None:
        """The headers, read once; None without weights."""

    @abstractmethod
    def _read_range(self, file: str, start: int, size: int) -> bytes: ...


class TransformersSource(Source):
    """A source in the layout of transformers: `config.json`, and safetensors weights."""

    @abstractmethod
    def names(self) -> Collection[str]:
        """Returns the names of its files."""

    def fetch_companions(self) -> Path:
        return self.fetch()

    def read_config(self) -> dict[str, Any]:
        if CONFIG_NAME not in self.names():
            raise SourceError(
                f"{self.where}: {CONFIG_NAME} is required ({explain_missing_config(self.names(), self.path)}"
            )
        return parse_object(self._read(CONFIG_NAME), f"{self.where}/{CONFIG_NAME}", "mend the file")

    def headers(self, *, config_only: bool = False) -> CheckpointHeaders | None:
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

    @cached_property
    def _headers(self) -> CheckpointHeaders | None:
        return collect_headers(self.where, self.names(), self._read, self._read_headers, config_only=True)

    @abstractmethod
    def _read(self, name: str) -> bytes: ...

    @abstractmethod
    def _read_headers(self, files: Sequence[str]) -> Iterable[tuple[bytes, int]]: ...


class FolderSource(TransformersSource):
    """A source in a local folder."""

    def __init__(self, path: Path):
        self.path: Path = path

    @property
    def where(self) -> str:
        return str(self.path)

    def names(self) -> Collection[str]:
        return list_names(self.path)

    def fetch(self) -> Path:
        return self.path

    def hash_files(self) -> str | None:
        headers = self.headers(config_only=True)
        return None if headers is None else hash_weight_files(self.path, headers)

    def _read(self, name: str) -> bytes:
        return read_file(self.path / name)

    def _read_range(self, file: str, start: int, size: int) -> bytes:
        return read_range(self.path / file, start, size)

    def _hash_data(self) -> dict[str, str | None]:
        return {} if self._headers is None else sample_weight_files(self.path, self._headers)

    def _read_headers(self, files: Sequence[str]) -> Iterable[tuple[bytes, int]]:
        return (read_header_bytes(self.path / file) for file in files)


def list_names(folder: Path) -> list[str]:
    """Returns the names in a folder; raises SourceError if it cannot be read."""
    try:
        return [path.name for path in folder.iterdir()]
    except OSError as error:
        raise SourceError(f"{folder}: a readable folder is required ({error.strerror}); check it") from None


def sample_weight_files(folder: Path, headers: CheckpointHeaders) -> dict[str, str | None]:
    """Returns the hashes of weight files that are quickly known: `sample_sha256`, and `files_sha256` if it is listed.

    Args:
        folder: The folder of the files.
        headers: Headers of their tensors.
    """
    digest = hashlib.sha256()
    for file in headers.files:
        with open_file(folder / file) as opened:
            for info in headers.tensors.values():
                if info.file == file:
                    opened.seek(info.start + max(0, (info.num_bytes - _SAMPLE_BYTES) // 2))
                    digest.update(opened.read(min(_SAMPLE_BYTES, info.num_bytes)))
    hashes = listed_hashes(folder, sorted(headers.files))
    listed = {} if hashes is None else {"files_sha256": _join_hashes(hashes)}
    return {"sample_sha256": digest.hexdigest(), **listed}


def hash_weight_files(folder: Path, headers: CheckpointHeaders) -> str:
    """Returns the hash of the hashes of all weight files, which are read whole."""
    return _join_hashes([content_hash(folder / file) for file in sorted(headers.files)])


def _join_hashes(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def is_same_source(one: Fingerprint, other: Fingerprint) -> bool:
    """Tells whether two fingerprints may be of one source: all hashes that both have are equal."""
    return all(one[key] == other[key] for key in one.keys() & other.keys() if None not in (one[key], other[key]))


def locate(source: str | Path) -> Source:
    """Finds a source: an existing folder or GGUF file if there is one, else the repository `org/name[@revision]`.

    A folder without `config.json` and with one GGUF model is that model.

    Raises:
        SourceError: There is no such folder or file and the text is no hub id, or the hub has no such repository.
        FolderError: The folder was written by refold and is torn.
    """
    text = str(source)
    if not text:
        raise SourceError("source: a folder or a hub id org/name[@revision] is required (got nothing); name one")
    path = settle(text)
    if path.is_dir():
        names = list_names(path)
        file = None if CONFIG_NAME in names else find_gguf(path, names)
        return FolderSource(path) if file is None else _gguf_source(file)
    if path.exists() and is_gguf(path):
        return _gguf_source(path)
    if path.exists():
        raise SourceError(f"{text}: a model folder is required (got a file); give the folder it lies in")
    match = _HUB_ID.fullmatch(text) if isinstance(source, str) else None
    if match is None or is_gguf(path):
        raise SourceError(
            f"{text}: a folder, a GGUF file or hub id org/name[@revision] is required (no such folder or file); "
            f"check the path"
        )
    # Imported only here, so that reading a folder never imports the hub's client.
    from refold.checkpoint.hub import HubSource

    return HubSource(match["id"], match["revision"])


def _gguf_source(path: Path) -> Source:
    from refold.checkpoint.gguf.source import GgufSource

    return GgufSource(path)
