"""The section `vocabulary`: the tokens that a model keeps."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from refold.fields import Amount, Count, Section, refuse_repeats
from refold.suggest import shorten

USED = "used"
"""The value of `keep` that counts tokens in the calibration text."""
TokenId = Annotated[int, Field(strict=True, ge=0)]


def _kind_of_token(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<id>"


TokenName = Annotated[
    Annotated[str, Field(min_length=1), Tag("<text>")] | Annotated[TokenId, Tag("<id>")],
    Discriminator(_kind_of_token),
]


class VocabularyTrim(Section):
    """Drops tokens that a text never uses, with their rows of embedding and head. Every text still encodes and decodes,
    perhaps to more tokens; a text that uses only kept tokens encodes to the same tokens as before."""

    keep: Annotated[str, Field(min_length=1)] = USED
    """`used`: the tokens that the calibration text has at least `least` times. Otherwise the path of a token list: a
    `.json` file with a list of tokens or ids, the `kept_tokens.json` of a folder, or a text file with one token in each
    line, as `tokenizer.json` writes it. Kept besides: single bytes or characters, special tokens, tokens that configs
    and the chat template use, and all tokens on the merge paths of kept tokens."""
    least: Count = 1
    """Occurrences in the calibration text from which on a token is kept."""
    tokens: Amount | None = None
    """Number of tokens of calibration text that are counted, documents in random order. Default: the whole text."""
    always: tuple[TokenName, ...] = ()
    """Tokens that are kept in any case, as `tokenizer.json` writes them, or their ids."""
    added: Literal["all", "used"] = "all"
    """Added tokens (such as Gemma's 6,242 `<unused0>`) that are kept: all of them, or only those that are used: in the
    counted text, by a config, by the template of start and end tokens, or by the chat template."""
    multiple: Count = 64
    """The number of tokens is rounded up to a multiple of this number by the next most frequent tokens."""

    @field_validator("always")
    @classmethod
    def _once(cls, value: tuple[str | int, ...]) -> tuple[str | int, ...]:
        return refuse_repeats(value)

    @property
    def counts_text(self) -> bool:
        """Whether the kept tokens follow from the calibration text."""
        return self.keep == USED

    def describe(self) -> str:
        """Returns the choice in words, such as `tokens that the text has at least 2 times`."""
        if not self.counts_text:
            return f"tokens of {shorten(self.keep)}"
        times = "once" if self.least == 1 else f"{self.least:,} times"
        return f"tokens that the text has at least {times}"
