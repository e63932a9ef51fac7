"""Where a source lies: a folder, or a repository of the hub when its id is given."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from refold.checkpoint.folder import settle
from refold.checkpoint.headers import CheckpointHeaders, collect_headers, read_header_bytes
from refold.checkpoint.other_folders import GGUF, explain_missing_config
from refold.errors import SourceError

CONFIG_NAME = "config.json"
PLAN_NAME = "plan.json"
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^\s@]+))?")


class Source(ABC):
    """A source checkpoint, wherever it lies.

    Attributes:
        path: its folder, or None on the hub.
        hub_id: its `org/name`, or None in a folder.
        revision: on the hub, the commit it was resolved to.
    """

    path: Path | None = None
    hub_id: str | None = None

    @property
    def revision(self) -> str | None:
        return None

    @property
    @abstractmethod
    def where(self) -> str:
        """What messages and reports call it: the folder, or `org/name@commit`."""

    @abstractmethod
    def names(self) -> Collection[str]:
        """Returns the names of its files."""

    @abstractmethod
    def fetch(self) -> Path:
        """Returns a folder with its weights, config, tokenizer and licence files, downloading what is on the hub."""

    @abstractmethod
    def _read(self, name: str) -> bytes: ...

    @abstractmethod
    def _read_headers(self, files: Sequence[str]) -> Iterable[tuple[bytes, int]]: ...

    def read_config(self) -> dict[str, Any]:
        """Returns `config.json` as it is written.

        Raises:
            SourceError: it is missing or not a JSON object.
        """
        if CONFIG_NAME not in self.names():
            raise SourceError(
                f"{self.where}: {CONFIG_NAME} is required ({explain_missing_config(self.names(), self.path)}"
            )
        try:
            config = json.loads(self._read(CONFIG_NAME))
        except (ValueError, RecursionError) as error:
            reason = str(error)[:80]
            raise SourceError(f"{self.where}/{CONFIG_NAME}: JSON is required ({reason}); mend the file") from None
        if not isinstance(config, dict):
            raise SourceError(f"{self.where}/{CONFIG_NAME}: a JSON object is required (got {type(config).__name__})")
        return config

    def headers(self, *, config_only: bool = False) -> CheckpointHeaders | None:
        """Returns the checkpoint's headers; with `config_only`, None where there are no weights.

        Raises:
            SourceError: a shard is missing or damaged, or there are no safetensors weights.
        """
        if self._headers is None and not config_only:
            return collect_headers(self.where, self.names(), self._read, self._read_headers)
        return self._headers

    def fingerprint(self) -> dict[str, str | None]:
        """Returns `config_sha256` and `index_sha256` (of the index, or a single file's header); None where missing."""
        config = hashlib.sha256(self._read(CONFIG_NAME)).hexdigest() if CONFIG_NAME in self.names() else None
        return {"config_sha256": config, "index_sha256": self._headers.sha256 if self._headers else None}

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
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise SourceError(f"{self.path / name}: cannot be read ({error.strerror}); check the file") from None

    def _read_headers(self, files: Sequence[str]) -> Iterable[tuple[bytes, int]]:
        return (read_header_bytes(self.path / file) for file in files)


def locate(source: str | Path) -> Source:
    """Finds a source: a folder that exists always wins, else `org/name[@revision]` is asked of the hub.

    Raises:
        SourceError: there is no such folder and the string is no hub id, or the hub does not give it.
        FolderError: the folder was written by refold and is torn.
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
    # Here and nowhere else: what reads folders never comes near the hub's client.
    from refold.checkpoint.hub import HubSource

    return HubSource(match["id"], match["revision"])
