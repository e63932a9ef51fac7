"""The mistakes a user can make, one kind each. The command line prints one line and exits with status 2."""


class RefoldError(Exception):
    """A mistake of the user's. The message reads `where: what is required (got what); how to mend it`."""


class RecipeError(RefoldError):
    """A recipe, or an override of one of its keys, does not say something refold can do."""


class SourceError(RefoldError):
    """A source checkpoint is missing, broken, of an unknown family, or not what was planned for."""


class FolderError(RefoldError):
    """A folder cannot be read, written, locked or verified."""


class DataError(RefoldError):
    """A text, jsonl or parquet file cannot be read, or holds too little."""


class HealError(RefoldError):
    """Training cannot start, cannot resume, or must not go on."""


class ExportError(RefoldError):
    """A model cannot be written in the format asked for."""
