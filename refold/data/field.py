"""The field of a row that holds its document, and the form of the document: text or conversation."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from refold.data.chat import Conversation, read_conversation
from refold.errors import DataError
from refold.suggest import did_you_mean

Form = Literal["text", "chat"]
Document = str | Conversation
_SHOWN = 12
DEFAULT_NAMES: dict[Form, str] = {"text": "text", "chat": "messages"}


class OtherContentError(DataError):
    """A file or row has no documents; in a folder such a file is skipped and listed."""


@dataclass(frozen=True)
class Field:
    """The field of a row that holds the document.

    Attributes:
        name: Name of the jsonl field, or of the column of a parquet file or data set.
        form: `text` for a string, `chat` for a list of messages.
        noun: Word for the field in error messages.
    """

    name: str
    form: Form = "text"
    noun: str = "field"

    @classmethod
    def of(cls, name: str | None, form: Form) -> "Field":
        """Returns the field with a name; None: the default name of the form."""
        return cls(name or DEFAULT_NAMES[form], form)

    def read_row(self, row: Mapping[str, Any], where: str) -> Document:
        """Returns the document of a row.

        Raises:
            DataError: The row does not have the field, or `read` refuses its value.
        """
        if self.name not in row:
            raise self.missing(row, where)
        return self.read(row[self.name], where)

    def missing(self, names: Iterable[str], where: str, remedy: str | None = None) -> OtherContentError:
        """Returns the error for a row or file without the field; the message lists its fields."""
        legal = sorted(str(name) for name in names)
        shown = [name[:40] for name in legal[:_SHOWN]]
        more = f" and {len(legal) - _SHOWN} more" if len(legal) > _SHOWN else ""
        held = "messages" if self.form == "chat" else "text"
        remedy = remedy or f"name the one that holds the {held}: --field NAME, or FILE?field=NAME"
        close = did_you_mean(self.name, legal)
        return OtherContentError(f"{where}: {self.noun} '{self.name}' is required (got {shown}{more}){close}; {remedy}")

    def read(self, value: object, where: str) -> Document:
        """Returns the document in a value of the field.

        Raises:
            DataError: The value is not a string of Unicode text, or not a conversation.
        """
        if self.form == "chat":
            return read_conversation(value, f"{where}: {self.noun} '{self.name}'")
        return self.read_value(value, f"{where}: {self.noun} '{self.name}'")

    def read_value(self, value: object, where: str) -> str:
        """Checks that a value is a text and returns it.

        Raises:
            DataError: The value is not a string of Unicode text.
        """
        if not isinstance(value, str):
            got = "null" if value is None else type(value).__name__
            raise DataError(f"{where} must be a string (got {got})")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where} must be Unicode text (got a lone surrogate)") from error
        return value
