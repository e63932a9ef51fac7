"""The field of a row that holds its document, and what form documents have there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from refold.data.conversation import Conversation, read_conversation
from refold.errors import DataError
from refold.suggest import did_you_mean

Form = Literal["text", "chat"]
Document = str | Conversation
DEFAULT_NAMES: dict[Form, str] = {"text": "text", "chat": "messages"}


@dataclass(frozen=True)
class Field:
    """Where a row's document is.

    Attributes:
        name: of the jsonl field, or of the parquet or data set column.
        form: `text`, a string; `chat`, a list of messages.
        noun: what messages call it.
    """

    name: str
    form: Form = "text"
    noun: str = "field"

    @classmethod
    def of(cls, name: str | None, form: Form) -> "Field":
        """Returns the field of a name; None: the form's usual one."""
        return cls(name or DEFAULT_NAMES[form], form)

    def read_row(self, row: Mapping[str, Any], where: str) -> Document:
        """Returns the document of a row.

        Raises:
            DataError: the row lacks the field, or `read` refuses it.
        """
        if self.name not in row:
            hint = did_you_mean(self.name, row)
            raise DataError(f"{where}: {self.noun} '{self.name}' is required (got {sorted(row)}){hint}")
        return self.read(row[self.name], where)

    def read(self, value: object, where: str) -> Document:
        """Returns the document that a value of the field is.

        Raises:
            DataError: it is not a string of Unicode text, or not a conversation.
        """
        if self.form == "chat":
            return read_conversation(value, f"{where}: {self.noun} '{self.name}'")
        if not isinstance(value, str):
            got = "null" if value is None else type(value).__name__
            raise DataError(f"{where}: {self.noun} '{self.name}' must be a string (got {got})")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {self.noun} '{self.name}' must be Unicode text (got a lone surrogate)"
            ) from error
        return value
