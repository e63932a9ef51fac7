"""A menu on disk, with the source, the text and the settings that it was measured with."""

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from refold.checkpoint.atomic_file import write_text
from refold.checkpoint.locate import Source, is_same_source
from refold.errors import FolderError, SourceError
from refold.families.arch import Frozen
from refold.fitting.menu import Menu

MENU_NAME = "menu.json"
FORMAT = 1
AGAIN = "measure again, or choose another folder"


class MeasuredOn(Frozen):
    """What a menu was measured on."""

    source: dict[str, Any]
    """The source's fingerprint."""
    text: str
    """Name of the text."""
    tokens: int
    settings: dict[str, Any]
    """All other settings of the measurement, by name."""


class SavedMenu(Frozen):
    """The contents of the file."""

    format: Literal[1] = FORMAT
    measured: MeasuredOn
    menu: Menu

    def write(self, folder: Path) -> None:
        """Writes the file atomically into a folder.

        Raises:
            FolderError: The file cannot be written.
        """
        write_text(folder / MENU_NAME, self.model_dump_json() + "\n")


def read_menu(folder: Path, source: Source, wanted: MeasuredOn | None = None) -> Menu:
    """Reads the menu of a source.

    Args:
        folder: The folder that `measure_menu` wrote.
        source: The source that the menu must belong to.
        wanted: Text and settings that it must have been measured with; None: any.

    Raises:
        FolderError: The menu is missing or damaged.
        SourceError: It is another source's, or was measured on another text or with other settings.
    """
    path = folder / MENU_NAME
    try:
        found = SavedMenu.model_validate_json(path.read_bytes())
    except OSError as error:
        raise FolderError(
            f"{path}: a menu of measured choices is required ({error.strerror}); measure the source"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(key) for key in first["loc"])
        raise FolderError(
            f"{path}: a menu of format {FORMAT} is required ({where + ': ' if where else ''}{first['msg']}); {AGAIN}"
        ) from None
    if not is_same_source(found.measured.source, source.fingerprint()):
        raise SourceError(f"{path}: a menu of {source.where} is required (got another source's); {AGAIN}")
    if wanted is not None:
        _require_equal(path, found.measured, wanted)
    return found.menu


def _require_equal(path: Path, found: MeasuredOn, wanted: MeasuredOn) -> None:
    have = {"text": found.text, "tokens": found.tokens, **found.settings}
    want = {"text": wanted.text, "tokens": wanted.tokens, **wanted.settings}
    for name in {**want, **have}:
        if have.get(name) != want.get(name):
            raise SourceError(
                f"{path}: a menu with {name} {want.get(name)!r} is required (got {have.get(name)!r}); {AGAIN}"
            )
