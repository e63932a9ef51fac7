import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from refold.checkpoint import hub
from refold.checkpoint.hub import HubSource
from refold.checkpoint.locate import is_same_source, locate
from refold.errors import SourceError

COMMIT = "c" * 40


class Server(BaseHTTPRequestHandler):
    """Serves a folder over loopback, with or without byte ranges."""

    def __init__(self, log: "Log", *args: Any) -> None:
        self.log = log
        super().__init__(*args)

    def do_GET(self) -> None:
        path = self.log.folder / self.path.rpartition("/")[2]
        if not path.exists():
            self.send_error(404)
            return
        body = path.read_bytes()
        total = len(body)
        if self.log.has_ranges:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            body = body[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
            self.log.sent.append(len(body))
        except ConnectionError:
            self.log.sent.append(-1)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@dataclass
class Log:
    folder: Path
    has_ranges: bool = True
    sent: list[int] = field(default_factory=list)


@dataclass
class Hub:
    """A hub of one repository: its files, and its requests."""

    folder: Path
    log: Log
    calls: list[tuple[str, Any]] = field(default_factory=list)
    snapshot_commit: str = COMMIT

    def model_info(self, api: object, hub_id: str, revision: str | None = None, timeout: float | None = None) -> object:
        self.calls.append(("info", revision))
        siblings = [
            type("Sibling", (), {"rfilename": path.relative_to(self.folder).as_posix()}) for path in self.files()
        ]
        return type("Info", (), {"sha": COMMIT, "siblings": siblings})

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def hf_hub_download(self, hub_id: str, name: str, revision: str | None = None) -> str:
        self.calls.append(("download", name))
        return str(self.folder / name)

    def snapshot_download(self, hub_id: str, revision: str | None = None, **options: Any) -> str:
        self.calls.append(("snapshot", (revision, options)))
        return str(self.folder.parent / (COMMIT if revision == COMMIT else self.snapshot_commit))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / COMMIT
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    # Wide enough for one header to need a second request.
    names = [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(900)]
    save_file({name: torch.ones(2) for name in names}, folder / "model-00001-of-00002.safetensors")
    save_file({"a": torch.ones(300_000)}, folder / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {"a": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in (
        "tokenizer.json",
        "LICENSE",
        "pytorch_model.bin",
        "modeling_x.py",
        "consolidated.safetensors",
        "README.md",
    ):
        (folder / name).write_text("x")
    log = Log(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, log))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fake = Hub(folder, log)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda self, *args, **kw: fake.model_info(self, *args, **kw)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda hub_id, name, revision=None: f"{url}/{hub_id}/{name}")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield fake
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def test_planning_asks_for_headers_only(fake: Hub) -> None:
    source = locate("org/name@main")
    assert isinstance(source, HubSource)
    assert (source.path, source.hub_id, source.revision) == (None, "org/name", COMMIT)
    assert source.where == f"org/name@{COMMIT}"
    assert source.read_config() == {"model_type": "llama"}
    headers = source.headers()
    assert headers is not None
    assert len(headers.tensors) == 901
    assert headers.files == {path.name: path.stat().st_size for path in fake.folder.glob("model-*")}
    assert headers == locate(fake.folder).headers()
    assert source.fingerprint() == {key: locate(fake.folder).fingerprint()[key] for key in source.fingerprint()}
    assert is_same_source(source.fingerprint(), locate(fake.folder).fingerprint())
    assert fake.calls[0] == ("info", "main")
    assert set(fake.calls[1:]) == {
        ("download", "config.json"),
        ("download", "model.safetensors.index.json"),
    }
    assert len(fake.log.sent) == 3
    assert sum(fake.log.sent) < 300_000 < fake.folder.joinpath("model-00002-of-00002.safetensors").stat().st_size


def test_a_server_without_ranges_is_not_read_to_the_end(fake: Hub) -> None:
    fake.log.has_ranges = False
    headers = locate("org/name").headers()
    assert headers == locate(fake.folder).headers()


def test_a_shard_in_the_cache_is_not_asked_for(fake: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda hub_id, name, revision: str(fake.folder / name)
    )
    assert locate("org/name").headers() == locate(fake.folder).headers()
    assert fake.log.sent == []


def test_a_damaged_remote_header_is_named(fake: Hub) -> None:
    (fake.folder / "model-00002-of-00002.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(
        SourceError, match=rf"org/name@{COMMIT}/model-00002-of-00002\.safetensors: the header must be at most"
    ):
        locate("org/name").headers()


def test_a_pickle_repository_is_refused(fake: Hub) -> None:
    for path in fake.folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(SourceError, match=r"got pickle: pytorch_model\.bin"):
        locate("org/name").fetch()


def test_fetching_takes_weights_and_companions_by_name(fake: Hub) -> None:
    assert locate("org/name@main").fetch() == fake.folder
    revision, options = fake.calls[-1][1]
    assert revision == "main"
    assert set(options["allow_patterns"]) == {
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
        "LICENSE",
    }


def test_a_branch_that_moved_is_fetched_by_commit(fake: Hub) -> None:
    fake.snapshot_commit = "d" * 40
    assert locate("org/name").fetch() == fake.folder
    assert [call[1][0] for call in fake.calls if call[0] == "snapshot"] == [None, COMMIT]


def raises(error: Exception) -> Any:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


def response_error(kind: type[Exception], text: str = "no") -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (response_error(errors.GatedRepoError), "org/name@main: gated on the hub: access is required"),
        (
            response_error(errors.RevisionNotFoundError),
            "org/name@main: no such revision on the hub; check the part after @",
        ),
        (response_error(errors.RepositoryNotFoundError), "no such folder here and no such model on the hub"),
        (response_error(errors.HfHubHTTPError, "503 busy\nmore"), r"the hub refused \(503 busy\); try again later"),
        (errors.HFValidationError("bad id"), r"a hub id org/name is required \(bad id\)"),
    ],
)
def test_refusals_are_one_line(fake: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raises(error))
    with pytest.raises(SourceError, match=message) as caught:
        locate("org/name@main")
    assert "\n" not in str(caught.value)
    assert not [call for call in fake.calls if call[0] == "snapshot"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.OfflineModeIsEnabled("off"), "the hub cannot be asked .offline mode is on"),
        (errors.LocalEntryNotFoundError("none"), "the hub cannot be asked .no network, or offline"),
        (ConnectionError("down"), "the hub cannot be reached .ConnectionError"),
        (errors.HTTPError("down"), "the hub cannot be reached .HTTPError"),
    ],
)
def test_without_a_network_the_cache_serves_or_the_error_is_one_line(
    fake: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raises(error))
    source = locate("org/name")
    assert source.revision == COMMIT
    assert source.read_config() == {"model_type": "llama"}
    assert source.headers() == locate(fake.folder).headers()
    assert source.fetch() == fake.folder
    assert {call[0] for call in fake.calls} == {"snapshot"}
    (fake.folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"shard model-00002-of-00002\.safetensors is required"):
        locate("org/name").fetch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raises(error))
    with pytest.raises(SourceError, match=message):
        locate("org/name")


def test_offline_mode_is_told_by_the_real_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    huggingface_hub.close_session()
    with pytest.raises(SourceError, match=r"no-such-org/no-such-name: .*the hub cannot be asked"):
        locate("no-such-org/no-such-name")
    huggingface_hub.close_session()


def test_a_cached_file_that_cannot_be_read(fake: Hub) -> None:
    source = locate("org/name")
    (fake.folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json: cannot be read \(No such file.*check the hub cache"):
        source.read_config()


def test_an_http_error_while_reading_headers_is_one_line(fake: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = locate("org/name")
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *_, **__: f"http://127.0.0.1:{_closed_port()}/x")
    with pytest.raises(SourceError, match=r"the hub cannot be reached \(ConnectError\)"):
        source.headers()
    assert hub._NUM_CONNECTIONS > 1


def _closed_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
