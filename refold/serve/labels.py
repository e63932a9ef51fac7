"""Names of served models: labels that clients give, which tell nothing of the place of a folder."""

from collections.abc import Collection
from pathlib import Path

from refold.errors import RefoldError

MOST_CHARACTERS = 128


def read_named(option: str, text: str) -> tuple[str, str]:
    """Returns name and place of `NAME=PLACE`, or of a place alone, whose last part is its name.

    Args:
        option: The option's name in messages.
        text: A folder, a file or a hub id, with or without a name; an existing path is never cut at its `=`.

    Raises:
        RefoldError: The place is empty, or its name is no label.
    """
    name, sign, place = text.partition("=")
    if not sign or "/" in name or Path(text).exists():
        return default_name(option, text), text
    if not place:
        raise RefoldError(f"{option}: NAME=PLACE is required (got {text!r})")
    return require_label(option, name), place


def default_name(option: str, place: str) -> str:
    """Returns the last part of a folder's path, or of a hub id without its revision.

    Raises:
        RefoldError: It is no label.
    """
    path = Path(place).expanduser()
    return require_label(option, path.resolve().name if path.exists() else Path(place).name.split("@")[0])


def require_label(option: str, name: str) -> str:
    """Returns a name that is a label.

    Raises:
        RefoldError: It is empty, too long, or has a slash or a character that does not print.
    """
    is_short = 1 <= len(name) <= MOST_CHARACTERS
    if not is_short or not name.isprintable() or set(name) & set("/\\") or name != name.strip():
        raise RefoldError(
            f"{option}: a name of 1 to {MOST_CHARACTERS} printable characters without slashes is required "
            f"(got {name[: MOST_CHARACTERS + 1]!r})"
        )
    return name


def require_different(names: Collection[str]) -> None:
    """Checks that each name is used once.

    Raises:
        RefoldError: One is used twice.
    """
    for name in names:
        if sum(each == name for each in names) > 1:
            raise RefoldError(
                f"name: a name for each model is required (got {name!r} twice); give --name NAME, or NAME=FOLDER"
            )
