"""The field of a row that holds its document, and what form documents have there."""

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
    """A file or row holds something else than documents: in a folder it is skipped, and listed."""


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
            raise self.missing(row, where)
        return self.read(row[self.name], where)

    def missing(self, names: Iterable[str], where: str) -> OtherContentError:
        """Words the error of a row or file that has other fields."""
        legal = sorted(str(name) for name in names)
        shown = [name[:40] for name in legal[:_SHOWN]]
        more = f" and {len(legal) - _SHOWN} more" if len(legal) > _SHOWN else ""
        return OtherContentError(
            f"{where}: {self.noun} '{self.name}' is required (got {shown}{more}){did_you_mean(self.name, legal)}; name "
            f"the one that holds the {'messages' if self.form == 'chat' else 'text'}: --field NAME, or FILE?field=NAME"
        )

    def read(self, value: object, where: str) -> Document:
        """Returns the document that a value of the field is.

        Raises:
            DataError: it is not a string of Unicode text, or not a conversation.
        """
        if self.form == "chat":
            return read_conversation(value, f"{where}: {self.noun} '{self.name}'")
        return self.read_value(value, f"{where}: {self.noun} '{self.name}'")

    def read_value(self, value: object, where: str) -> str:
        """Returns a text as it is.

        Raises:
            DataError: it is not a string of Unicode text.
        """
        if not isinstance(value, str):
            got = "null" if value is None else type(value).__name__
            raise DataError(f"{where} must be a string (got {got})")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where} must be Unicode text (got a lone surrogate)") from error
        return value
