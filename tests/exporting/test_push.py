import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from refold.checkpoint.folder import AtomicFolder
from refold.cli import main
from refold.errors import ExportError, FolderError
from refold.exporting.push import FORMER_WEIGHTS, plan_upload, push


class FakeHub:
    """Notes the calls of `HfApi`, and raises an error at the upload if it has one."""

    def __init__(self, error: Exception | None = None):
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error = error

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo": repo, **options}))

    def create_branch(self, repo: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repo": repo, **options}))

    def upload_folder(self, **options: Any) -> str:
        self.calls.append(("upload_folder", options))
        if self.error is not None:
            raise self.error
        return "https://hub.example/commit/1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with AtomicFolder(tmp_path / "model") as out:
        (out.path / "config.json").write_text("{}")
        (out.path / "README.md").write_text("a card")
        (out.path / "model.safetensors").write_bytes(bytes(64))
        (out.path / "templates").mkdir()
        (out.path / "templates" / "chat.jinja").write_text("{{ messages }}")
    return tmp_path / "model"


def test_the_files_of_refold_go_and_no_others(folder: Path):
    (folder / "notes.txt").write_text("mine")
    (folder / "exits.json").write_text("{}")
    upload = plan_upload(folder)
    names = ["README.md", "config.json", "exits.json", "manifest.json", "model.safetensors", "templates/chat.jinja"]
    assert list(upload.files) == names
    assert upload.left_out == ("notes.txt",)
    assert upload.num_bytes == sum((folder / name).stat().st_size for name in names)
    hub = FakeHub()
    assert push(upload, "org/name", api=hub) == "https://hub.example/commit/1"
    (made, repo), (sent, options) = hub.calls
    assert (made, sent) == ("create_repo", "upload_folder")
    assert repo == {"repo": "org/name", "repo_type": "model", "private": None, "exist_ok": True}
    assert options["allow_patterns"] == names
    assert options["delete_patterns"] == list(FORMER_WEIGHTS)
    assert options["revision"] is None


def test_a_branch_is_made_and_a_new_repository_may_be_private(folder: Path):
    hub = FakeHub()
    push(plan_upload(folder), "org/name", private=True, revision="loops-2", api=hub)
    assert [name for name, _ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[0][1]["private"] is True
    assert hub.calls[1][1]["branch"] == hub.calls[2][1]["revision"] == "loops-2"


def test_an_edited_card_goes_along(folder: Path):
    (folder / "README.md").write_text("a better card")
    assert "README.md" in plan_upload(folder).files


def test_a_folder_of_others_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FolderError, match=r"a folder that refold wrote is required .it has no manifest.json of refold"):
        plan_upload(tmp_path)
    with pytest.raises(FolderError, match=r"a folder is required .there is none.; give one that refold wrote"):
        plan_upload(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"model.safetensors .missing."),
        (lambda folder: (folder / "model.safetensors").write_bytes(bytes(63)), "63 bytes instead of 64"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1" * 64), "content differs from its sha256"),
        (lambda folder: (folder / "more.safetensors").write_bytes(b"1"), r"more.safetensors .not listed."),
    ],
)
def test_a_torn_folder_is_refused(folder: Path, change: Callable[[Path], Any], told: str):
    change(folder)
    with pytest.raises(FolderError, match=rf"{told}.*; copy the folder again or make it anew"):
        plan_upload(folder)


@pytest.mark.parametrize("name", [".env", "prod.env", "deploy.PEM", "id_rsa", "templates/.netrc", "token"])
def test_a_file_of_secrets_is_refused(folder: Path, name: str):
    (folder / name).write_text("PASSWORD=1")
    with pytest.raises(ExportError, match=rf"a folder without files of secrets is required .got {name}.; move them"):
        plan_upload(folder)


@pytest.mark.parametrize("secret", ["hf_" + "a" * 34, "AKIA" + "A" * 16, "-----BEGIN RSA PRIVATE KEY-----"])
def test_a_secret_in_a_text_is_refused_and_not_shown(folder: Path, secret: str):
    (folder / "README.md").write_text(f"run with {secret} please")
    with pytest.raises(ExportError, match=r"README.md: a text without secrets is required") as raised:
        plan_upload(folder)
    assert secret not in str(raised.value)


@pytest.mark.parametrize("name", ["name", "org/", "a/b/c", "org/na me", "org/..", "https://hub/org/name", ""])
def test_a_name_that_is_no_repository_is_refused(folder: Path, name: str):
    hub = FakeHub()
    with pytest.raises(ExportError, match=r"push: repository: org/name is required"):
        push(plan_upload(folder), name, api=hub)
    assert hub.calls == []


def _refusal(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("refused\nwith details", response=response)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LocalTokenNotFoundError("no token"), r"a login is required .there is none.; run `hf auth login`"),
        (_refusal(403), r"must accept the upload .got refused.; log in with `hf auth login` as a user who may write"),
        (_refusal(500), r"must accept the upload .got refused.; try again later"),
        (OfflineModeIsEnabled("offline"), r"a connection to the hub is required .offline.; check the network"),
        (HTTPError("no route"), r"a connection to the hub is required .no route."),
        (ConnectionError("no route"), r"a connection to the hub is required .no route.; check the network"),
    ],
)
def test_errors_of_the_hub_are_told_in_one_line(folder: Path, error: Exception, told: str):
    with pytest.raises(ExportError, match=told):
        push(plan_upload(folder), "org/name", api=FakeHub(error))


def test_a_dry_run_prints_the_files_and_uses_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(sys, "argv", ["refold", "push", str(folder), "org/name", "--dry-run", "--json"])
    with contextlib.suppress(SystemExit):
        main()
    told = capsys.readouterr()
    assert json.loads(told.out)["model.safetensors"] == 64
    assert "5 files, " in told.err


def test_the_library_calls_that_push_makes_exist():
    code = (
        "import inspect\nfrom huggingface_hub import HfApi\n"
        "wanted = {'upload_folder': {'repo_id', 'folder_path', 'repo_type', 'revision', 'commit_message', "
        "'allow_patterns', 'delete_patterns'}, 'create_repo': {'repo_type', 'private', 'exist_ok'}, "
        "'create_branch': {'branch', 'exist_ok'}}\n"
        "for name, options in wanted.items():\n"
        "    assert options <= set(inspect.signature(getattr(HfApi, name)).parameters), name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
