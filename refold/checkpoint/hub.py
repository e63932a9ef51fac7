"""Sources on the hub: configs and headers by small requests, whole checkpoints only for a conversion."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from refold.checkpoint.companions import is_companion
from refold.checkpoint.headers import INDEX_NAME, header_length, read_header_bytes
from refold.checkpoint.locate import CONFIG_NAME, TransformersSource
from refold.checkpoint.manifest import EXITS_NAME
from refold.checkpoint.source_file import open_file
from refold.errors import SourceError

_FIRST_BYTES = 1 << 16  # holds most headers whole, so that one request per shard does
_NUM_CONNECTIONS = 8
_COMPARED_BYTES, _NUM_COMPARED = 4096, 8


class HubSource(TransformersSource):
    """A repository of the Hugging Face hub, resolved to a commit when it is made.

    Without a network, or with `HF_HUB_OFFLINE`, the local cache is used.

    Args:
        hub_id: `org/name`.
        revision: Branch, tag or commit; None: the default branch.

    Raises:
        SourceError: The repository is gated or missing, has no such revision, or is not in the cache while offline.
    """

    def __init__(self, hub_id: str, revision: str | None = None):
        from huggingface_hub import HfApi, snapshot_download

        self.hub_id: str = hub_id
        self._asked = f"{hub_id}@{revision}" if revision else hub_id
        self._branch = revision
        self._snapshot: Path | None = None
        self._names: list[str] = []
        try:
            with _explained(self._asked):
                info = HfApi().model_info(hub_id, revision=revision, timeout=30)
                self._commit = info.sha
                self._names = [sibling.rfilename for sibling in info.siblings or []]
        except _Unreachable:
            # The cache's fallback for a missing network; every report names the commit that is used.
            with _explained(self._asked):
                # Only the config is required here; missing shards are named when headers are read.
                needed = [CONFIG_NAME]
                found = snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=needed)
            self._snapshot = Path(found)
            self._commit = self._snapshot.name
            self._names = [path.relative_to(self._snapshot).as_posix() for path in self._snapshot.rglob("*")]

    @property
    def revision(self) -> str | None:
        return self._commit

    @property
    def where(self) -> str:
        return f"{self.hub_id}@{self._commit}" if self._commit else self._asked

    def names(self) -> Collection[str]:
        return self._names

    def fetch(self) -> Path:
        """Downloads safetensors, config, tokenizer and licence files, never pickles or code, and returns their folder.

        Raises:
            SourceError: there are no safetensors weights, or the download fails.
        """
        from huggingface_hub import snapshot_download

        headers = self.headers()
        if self._snapshot is not None:
            return self._snapshot
        assert headers is not None
        wanted = {CONFIG_NAME, INDEX_NAME, EXITS_NAME, *headers.files}
        # Exact names: a pattern for shards would also fetch the second copies some repositories keep in other layouts.
        files = [name for name in self._names if name in wanted or is_companion(name)]
        with _explained(self.where):
            # By the name of the revision, so that the cache finds it when offline; by commit if the branch has moved.
            folder = Path(snapshot_download(self.hub_id, revision=self._branch, allow_patterns=files))
            if folder.name != self._commit:
                folder = Path(snapshot_download(self.hub_id, revision=self._commit, allow_patterns=files))
        return folder

    def _read(self, name: str) -> bytes:
        from huggingface_hub import hf_hub_download

        try:
            if self._snapshot is not None:
                return (self._snapshot / name).read_bytes()
            with _explained(self.where):
                return Path(hf_hub_download(self.hub_id, name, revision=self._commit)).read_bytes()
        except OSError as error:
            raise SourceError(f"{self.where}/{name}: cannot be read ({error.strerror}); check the hub cache") from None

    def _compared_ranges(self, num_bytes: int) -> Iterable[tuple[int, int]]:
        # A few ranges show over the network whether the head differs; fetched tensors are compared whole.
        size = min(_COMPARED_BYTES, num_bytes)
        places = {(num_bytes - size) * part // (_NUM_COMPARED - 1) for part in range(_NUM_COMPARED)}
        return ((start, size) for start in sorted(places))

    def _read_range(self, file: str, start: int, size: int) -> bytes:
        from huggingface_hub import hf_hub_url, try_to_load_from_cache

        cached = try_to_load_from_cache(self.hub_id, file, revision=self._commit)
        local = self._snapshot / file if self._snapshot is not None else cached
        if isinstance(local, str | Path):
            with open_file(Path(local)) as opened:
                opened.seek(start)
                return opened.read(size)
        with _explained(self.where):
            url = hf_hub_url(self.hub_id, file, revision=self._commit)
            return _get_range(url, size, start)[0]

    def _read_headers(self, files: Sequence[str]) -> Iterable[tuple[bytes, int]]:
        with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
            return list(pool.map(self._read_header, files))

    def _read_header(self, file: str) -> tuple[bytes, int]:
        from huggingface_hub import hf_hub_url, try_to_load_from_cache

        if self._snapshot is not None:
            return read_header_bytes(self._snapshot / file)
        cached = try_to_load_from_cache(self.hub_id, file, revision=self._commit)
        if isinstance(cached, str):
            return read_header_bytes(Path(cached))
        url = hf_hub_url(self.hub_id, file, revision=self._commit)
        with _explained(self.where):
            raw, file_bytes = _get_range(url, _FIRST_BYTES)
            end = 8 + header_length(raw, file_bytes, where=f"{self.where}/{file}")
            if end > len(raw):
                raw, file_bytes = _get_range(url, end)
        return raw[8:end], file_bytes


class _Unreachable(SourceError):
    pass


def _get_range(url: str, num_bytes: int, start: int = 0) -> tuple[bytes, int]:
    """Returns bytes of a remote file from `start` on, and the file's size."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + num_bytes - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=30) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        if response.status_code == 206:
            size = int(response.headers["Content-Range"].rpartition("/")[2])
        else:
            size = int(response.headers.get("Content-Length", 0))
            num_bytes += start  # a server without ranges begins at the front
        raw = bytearray()
        # A server without ranges sends the whole file: reading stops after the requested bytes.
        for chunk in response.iter_bytes(1 << 16):
            raw += chunk
            if len(raw) >= num_bytes:
                break
    return bytes(raw[:num_bytes])[start if response.status_code != 206 else 0 :], size


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turns each error of the hub's client into one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise SourceError(
            f"{where}: gated on the hub: access is required; ask for it on the model's page, then `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{where}: no such revision on the hub; check the part after @") from None
    except errors.RepositoryNotFoundError:
        raise SourceError(
            f"{where}: no such folder here and no such model on the hub (or a private one); "
            f"check the name, or `hf auth login`"
        ) from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        reason = "offline mode is on" if isinstance(error, errors.OfflineModeIsEnabled) else "no network, or offline"
        raise _Unreachable(
            f"{where}: no such folder here, and the hub cannot be asked ({reason}; not whole in the cache); "
            f"go online once, or give a folder"
        ) from None
    except errors.HFValidationError as error:
        raise SourceError(f"{where}: a hub id org/name is required ({str(error).splitlines()[0][:120]})") from None
    except errors.HfHubHTTPError as error:
        raise SourceError(f"{where}: the hub refused ({str(error).splitlines()[0][:120]}); try again later") from None
    except (ConnectionError, TimeoutError, errors.HTTPError) as error:
        raise _Unreachable(
            f"{where}: no such folder here, and the hub cannot be reached ({type(error).__name__}); "
            f"go online, or give a folder"
        ) from None
