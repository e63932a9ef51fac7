"""Uploads a folder that refold wrote to a model hub, after it is checked for damage and for secrets."""

import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from refold.checkpoint.folder import repair
from refold.checkpoint.manifest import is_refold_folder, listed_files, verify
from refold.errors import ExportError, FolderError

SECRET_NAMES = (
    ".env",
    ".env.*",
    "*.env",
    "*.pem",
    "*.key",
    "*.p12",
    "id_rsa*",
    "id_ed25519*",
    ".netrc",
    ".npmrc",
    ".pypirc",
    ".git-credentials",
    "credentials*",
    "*secret*",
    "token",
    "*.token",
)
"""Patterns of file names that hold secrets, in small letters."""
_SECRETS = re.compile(
    rb"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|gh[pousr]_[A-Za-z0-9]{36,}|AKIA[0-9A-Z]{16})\b"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_TEXTS = (".md", ".json", ".txt", ".yaml", ".yml", ".jinja", ".py")
_MOST_TEXT_BYTES = 1 << 22
_REPOSITORY = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?/[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?")
FORMER_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
"""Patterns of weights of an earlier push, which would be read instead of, or beside, the new ones."""


@dataclass(frozen=True)
class Upload:
    """The files of an upload.

    Attributes:
        folder: Their folder.
        files: Name and bytes of each file.
        left_out: Files of the folder that refold did not write; they stay here.
    """

    folder: Path
    files: dict[str, int]
    left_out: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())


def plan_upload(folder: str | Path, progress: Callable[[int], None] | None = None) -> Upload:
    """Checks a folder, and returns the files that a push uploads: those that refold wrote; the network is not used.

    Args:
        folder: A folder that refold wrote; its model card may have been edited.
        progress: Called with the number of bytes checked since the last call.

    Raises:
        FolderError: The folder is missing, torn or damaged, or is not refold's.
        ExportError: A file in the folder looks like a secret, or holds one.
    """
    folder = Path(folder).expanduser()
    repair(folder)
    if not folder.is_dir():
        raise FolderError(f"{folder}: a folder is required (there is none); give one that refold wrote")
    if not is_refold_folder(folder):
        raise FolderError(
            f"{folder}: a folder that refold wrote is required (it has no manifest.json of refold); "
            f"export the model first"
        )
    present = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    _refuse_secret_names(folder, present)
    verify(folder, progress, allow_edited=True)
    names = listed_files(folder)
    for name in names:
        _refuse_secrets(folder / name, name)
    left_out = tuple(name for name in present if name not in names)
    return Upload(folder, {name: (folder / name).stat().st_size for name in names}, left_out)


def push(
    upload: Upload,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    api: Any = None,
) -> str:
    """Uploads a folder in one commit; the repository is made if there is none.

    Weights of an earlier push that have other names are removed in the same commit; the history keeps them.

    Args:
        upload: From `plan_upload`.
        repository: `org/name`.
        private: Whether a new repository is private.
        revision: The branch, made if there is none; None: the default branch.
        message: Of the commit.
        api: huggingface_hub's `HfApi`, or an object with its methods; None: made with the user's own login.

    Returns:
        The address of the commit.

    Raises:
        ExportError: The name of the repository is none, nobody is logged in, or the hub refuses or cannot be reached.
    """
    check_repository(repository)
    from huggingface_hub import HfApi, errors

    api = HfApi() if api is None else api
    try:
        api.create_repo(repository, repo_type="model", private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=str(upload.folder),
            repo_type="model",
            revision=revision,
            commit_message=message or "Upload a model folder of refold",
            allow_patterns=[glob.escape(name) for name in upload.files],
            delete_patterns=list(FORMER_WEIGHTS),
        )
    except errors.LocalTokenNotFoundError:
        raise ExportError("push: a login is required (there is none); run `hf auth login`, or set HF_TOKEN") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        mend = (
            "log in with `hf auth login` as a user who may write there" if status in (401, 403) else "try again later"
        )
        raise ExportError(f"push: {repository}: the hub must accept the upload (got {_line(error)}); {mend}") from error
    except (OSError, errors.HTTPError) as error:
        raise ExportError(
            f"push: {repository}: a connection to the hub is required ({_line(error)}); check the network, and that "
            f"HF_HUB_OFFLINE is not set"
        ) from error
    return str(getattr(done, "commit_url", done))


def check_repository(repository: str) -> None:
    """Checks the name of a repository.

    Raises:
        ExportError: It is no `org/name`.
    """
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise ExportError(f"push: repository: org/name is required (got {repository!r}); letters, digits, `-_.`")


def _refuse_secret_names(folder: Path, names: Sequence[str]) -> None:
    found = [name for name in names if any(fnmatch(Path(name).name.lower(), each) for each in SECRET_NAMES)]
    if found:
        raise ExportError(
            f"push: {folder}: a folder without files of secrets is required (got {', '.join(found[:5])}); move them "
            f"away"
        )


def _refuse_secrets(path: Path, name: str) -> None:
    if not name.endswith(_TEXTS) or path.stat().st_size > _MOST_TEXT_BYTES:
        return
    found = _SECRETS.search(path.read_bytes())
    if found:
        shown = found.group().decode()[:6]
        raise ExportError(
            f"push: {name}: a text without secrets is required (it holds one that begins with {shown!r}); revoke the "
            f"secret and remove it from the text"
        )


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
