"""Token ids turned into text one at a time, in pieces that are whole characters."""

from collections import deque
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_PIECES = 6


class Detokeniser:
    """Gives the text that each new token adds to what came before.

    Decoding a token by itself loses the space that some vocabularies write at its front, and the bytes of characters
    that take several tokens. So a token is decoded together with its neighbours on the left, and what they give alone
    is taken off; a piece that ends inside a character waits for the rest.

    Args:
        tokenizer: Special tokens are left out of the text.
        prompt: Ids the new ones follow; their text is not given.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # Each entry is whole characters, so that forgetting the oldest never cuts one.
        self._given: deque[list[int]] = deque(maxlen=_CONTEXT_PIECES)
        self._given.append(self._end_of(list(prompt)))
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """Takes the next token and returns the text that is whole now, often empty or several tokens'."""
        self._waiting.append(token)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._given.append(self._waiting)
        self._waiting = []
        return text

    def finish(self) -> str:
        """Returns what still waited: the tail of a character whose end never came, as replacement characters."""
        text = self._new_text() if self._waiting else ""
        self._waiting = []
        return text

    def _end_of(self, prompt: list[int]) -> list[int]:
        length = min(_CONTEXT_PIECES, len(prompt))
        while length < len(prompt) and self._decode(prompt[-length:]).startswith(_REPLACEMENT):
            length += 1
        return prompt[len(prompt) - length :]

    def _new_text(self) -> str:
        given = [token for piece in self._given for token in piece]
        return self._decode([*given, *self._waiting])[len(self._decode(given)) :]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
