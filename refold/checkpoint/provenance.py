"""`provenance.json`: the stages that made a model folder."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from refold.checkpoint.locate import Source, is_same_source, locate
from refold.errors import FolderError, SourceError
from refold.version import __version__

PROVENANCE_NAME = "provenance.json"
FORMAT = 1


def _versions() -> dict[str, str]:
    found = {"refold": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


@dataclass(frozen=True)
class Stage:
    """One stage of a model's production, such as `convert` or `heal`.

    Attributes:
        stage: Its name.
        source: The model that it read: `path` or `id`, `revision`, `fingerprint` (see `describe_source`).
        recipe: The recipe, or its section, as plain data.
        seed: Seed of all random numbers of the stage.
        tokens: Training tokens; 0 for stages that do not train.
        text: Share of each kind of text that the stage fitted the model to, by name; None: no weights were given.
        command: The command line as typed.
        versions: Versions of refold, python, torch and transformers when the stage is made.
        time: Local time with offset, likewise.
    """

    stage: str
    source: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    tokens: int = 0
    text: dict[str, float | None] = field(default_factory=dict)
    command: str = ""
    versions: dict[str, str] = field(default_factory=_versions)
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))


def describe_source(source: Source) -> dict[str, Any]:
    """Returns the record of a source: `path` (absolute) or `id`, `revision` and `fingerprint`."""
    place = {"path": str(source.path.resolve())} if source.path is not None else {"id": source.hub_id}
    return {**place, "revision": source.revision, "fingerprint": source.fingerprint()}


def read(folder: Path) -> list[Stage]:
    """Returns a folder's stages, first to last; an empty list without provenance.

    Raises:
        FolderError: The file exists and is not readable.
    """
    path = folder / PROVENANCE_NAME
    try:
        data = json.loads(path.read_bytes())
        known = {entry.name for entry in fields(Stage)}
        # Keys of a later version are dropped, so that an older refold reads a newer folder.
        return [Stage(**{key: value for key, value in stage.items() if key in known}) for stage in data["stages"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FolderError(f"{path}: a list of stages is required ({str(error)[:80]}); copy the folder again") from None


def fitted_texts(folder: Path) -> tuple[str, ...]:
    """Returns the names of all texts that a folder's model was calibrated or healed on, each once.

    Raises:
        FolderError: The provenance exists and is not readable.
    """
    texts = (stage.text for stage in read(folder) if isinstance(stage.text, dict))
    return tuple(dict.fromkeys(name for text in texts for name in text))


def append(before: Path | Sequence[Stage], stage: Stage) -> list[Stage]:
    """Returns the stages of a folder, or those given, with one more stage; nothing is written."""
    return [*(read(before) if isinstance(before, Path) else before), stage]


def write(folder: Path, stages: Sequence[Stage]) -> None:
    """Writes the stages into an unfinished folder."""
    data = {"format": FORMAT, "stages": [asdict(stage) for stage in stages]}
    (folder / PROVENANCE_NAME).write_text(json.dumps(data, indent=2, default=str) + "\n")


def teacher(folder: Path) -> Source:
    """Finds the model that a folder was folded from: the source of its first convert stage.

    Raises:
        FolderError: The folder has no convert stage.
        SourceError: The source is missing or has changed since it was converted.
    """
    found = next((stage for stage in read(folder) if stage.stage == "convert"), None)
    if found is None or not (found.source.get("path") or found.source.get("id")):
        raise FolderError(f"{folder}: a convert stage in {PROVENANCE_NAME} is required (none); name the teacher")
    place = found.source.get("path")
    if place is None:
        place = "@".join(part for part in (found.source["id"], found.source.get("revision")) if part)
    elif not Path(place).exists():
        raise SourceError(f"{folder}: its source {place} is required (missing); put it back or name the teacher")
    source = locate(place)
    fingerprint = found.source.get("fingerprint") or {}
    current = source.fingerprint()
    if fingerprint.get("files_sha256") and "files_sha256" not in current and source.path is not None:
        # Files newer than their manifest are hashed; training reads all of them anyway.
        current["files_sha256"] = source.hash_files()
    if not is_same_source(fingerprint, current):
        raise SourceError(
            f"{folder}: its source {place} is required as it was converted (config or weights changed since); "
            f"put it back or name the teacher"
        )
    source.ignore_tensors = _ignored(found)
    return source


def _ignored(convert: Stage) -> tuple[tuple[str, str], ...]:
    """Returns the `ignore_tensors` of a convert stage's recipe."""
    given = convert.recipe.get("ignore_tensors") or ()
    return tuple((str(each["name"]), str(each["reason"])) for each in given)
