from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, constants, errors

from refold.data.field import Field
from refold.data.location import HubName, open_hub
from refold.data.readers import DataSource
from refold.data.streams import DatasetStream
from refold.errors import DataError

FIELD = Field("text")
TEXTS = ["one", "two", "three"]


def _name(**fields: Any) -> HubName:
    return HubName(
        **{"name": "org/name", "revision": None, "config": None, "split": "train", "is_streamed": False, **fields}
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Makes a hub with one data set, and returns the arguments of `load_dataset`."""
    asked: list[dict[str, Any]] = []

    class Info:
        sha = "c0ffee"

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.append({"name": name, "config": config, **options})
        rows = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
        return rows.to_iterable_dataset() if options["streaming"] else rows

    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: Info())
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_data_set_is_loaded_at_its_commit(hub: list[dict[str, Any]]):
    opened = open_hub(_name(revision="v1", config="en", split="test"), FIELD)
    assert isinstance(opened, DataSource)
    assert list(opened.documents()) == TEXTS
    assert hub == [{"name": "org/name", "config": "en", "split": "test", "revision": "c0ffee", "streaming": False}]


def test_a_streamed_one_is_known_by_its_commit(hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    opened = open_hub(_name(is_streamed=True), FIELD)
    assert isinstance(opened, DatasetStream)
    cursor = opened.start(None)
    assert [cursor.next() for _ in range(4)] == [*TEXTS, None]
    assert opened.identity == "org/name@c0ffee None train text text"


def test_offline_the_cache_is_asked(hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    open_hub(_name(revision="v1"), FIELD)
    assert hub[0]["revision"] == "v1"


def _response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: errors.GatedRepoError("x", response=_response(403)), r"gated on the hub: access is required"),
        (lambda: errors.RevisionNotFoundError("x", response=_response(404)), r"no such revision on the hub"),
        (lambda: errors.RepositoryNotFoundError("x", response=_response(404)), r"no such data set on the hub"),
        (lambda: errors.HFValidationError("x"), r"a hub id org/name is required \(x\)"),
        (lambda: errors.HfHubHTTPError("x", response=_response(500)), r"the hub refused \(x\); try again later"),
        (lambda: errors.OfflineModeIsEnabled("x"), r"a network is required, or with HF_HUB_OFFLINE=1 a copy"),
        (lambda: ConnectionError("x"), r"a network is required"),
        (lambda: ValueError("Unknown split 'x'.\nmore"), r"a readable data set is required \(Unknown split 'x'\.\)$"),
        (lambda: DatasetNotFoundError("x"), r"a readable data set is required \(x\)"),
    ],
)
def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], message: str):
    def fail(*_: Any, **__: Any) -> Any:
        raise error()

    monkeypatch.setattr(HfApi, "dataset_info", fail)
    with pytest.raises(DataError, match=rf"^hf://org/name@v1: {message}") as caught:
        open_hub(_name(revision="v1"), FIELD)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_streamed: bool):
    # A port nobody listens on.
    original = HfApi.dataset_info
    monkeypatch.setattr(
        HfApi, "dataset_info", lambda _, *args, **named: original(HfApi("http://127.0.0.1:9"), *args, **named)
    )
    with pytest.raises(DataError, match=r"^hf://org/name: a network is required.*; go online, or give files$"):
        open_hub(_name(is_streamed=is_streamed), FIELD)
