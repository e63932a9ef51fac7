"""Exceptions for mistakes of the user. The command line prints one line for each and exits with status 2."""

from typing import TypeVar

T = TypeVar("T")


class RefoldError(Exception):
    """A mistake of the user. The message has the form `where: requirement (got value); how to mend it`."""


class RecipeError(RefoldError):
    """A recipe, or an override of a key, is invalid or does not fit the source."""


class SourceError(RefoldError):
    """A source checkpoint is missing, damaged, of an unknown family, or another one than planned."""


class FolderError(RefoldError):
    """A folder cannot be read, written, locked or verified."""


class DataError(RefoldError):
    """A text, jsonl or parquet file cannot be read, or holds too little text."""


class HealError(RefoldError):
    """Training cannot start, cannot resume, or must stop."""


class ExportError(RefoldError):
    """A model cannot be written in the chosen format."""


def given_or_default(value: T | None, kind: type[T], name: str) -> T:
    """Returns the settings given to a function, or the default ones.

    Raises:
        RefoldError: The value is of another type.
    """
    if value is None:
        return kind()
    if not isinstance(value, kind):
        got = type(value).__name__
        raise RefoldError(f"{name}: refold.{kind.__name__} is required (got {got}); give refold.{kind.__name__}(...)")
    return value
