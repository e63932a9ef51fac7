"""Exceptions for mistakes of the user. The command line prints one line for each and exits with status 2."""


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
