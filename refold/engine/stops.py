"""The text of one choice, and why it ends."""

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from refold.engine.results import Reason
from refold.errors import RefoldError
from refold.generation.sampling import Sampling
from refold.generation.stop_search import StopSearch
from refold.generation.stream import Detokeniser


class ChoiceText:
    """Takes the new tokens of one choice, knows when it ends, and gives its text in pieces.

    Without stop strings a token costs no decoding: text is decoded when it is taken, several tokens at once.

    Args:
        tokenizer: Tokenizer of the model; None: there is no text.
        prompt_ids: Tokens of the prompt, whose end the first new tokens are decoded with.
        sampling: Settings of the request: its stop strings, and whether end tokens are ignored.
        end_tokens: The model's end tokens.
        max_new_tokens: Most new tokens.

    Raises:
        RefoldError: There are stop strings and no tokenizer.

    Attributes:
        token_ids: New tokens, with those of a stop string, without an end token.
        reason: Why the choice ended; None while it goes on.
        stop: The stop string or end token it ended with.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        end_tokens: Collection[int],
        max_new_tokens: int,
    ):
        self.token_ids: list[int] = []
        self.reason: Reason | None = None
        self.stop: str | int | None = None
        self._end_tokens = frozenset() if sampling.ignore_eos else frozenset(end_tokens)
        self._max_new_tokens = max_new_tokens
        self._search = StopSearch(tuple(sampling.stop))
        self._has_stops = bool(sampling.stop)
        self._detokeniser = None if tokenizer is None else Detokeniser(tokenizer, prompt_ids)
        if self._has_stops and tokenizer is None:
            raise RefoldError(f"stop: a tokenizer is required for stop strings (got none, and {sampling.stop[0]!r})")
        self._num_decoded = 0
        self._is_complete = False
        self._text = ""
        self._num_taken = 0

    @property
    def is_ended(self) -> bool:
        """Whether the choice has ended."""
        return self.reason is not None

    def add(self, token: int) -> bool:
        """Takes the next token, and tells whether the choice has ended with it.

        Tokens after the end are ignored.
        """
        if self.reason is not None:
            return True
        if token in self._end_tokens:
            self._end("stop", token)
            return True
        self.token_ids.append(token)
        if self._has_stops:
            self._decode()
        if self.reason is None and len(self.token_ids) >= self._max_new_tokens:
            self._end("length")
        return self.reason is not None

    def end(self, reason: Reason) -> None:
        """Ends the choice, if it has not ended, for a reason outside its tokens."""
        if self.reason is None:
            self._end(reason)

    def take(self) -> str:
        """Returns the text that was not taken before and can no longer become part of a stop string.

        After the end the pieces joined are `text`.
        """
        self._decode()
        piece, self._num_taken = self._text[self._num_taken :], len(self._text)
        return piece

    @property
    def text(self) -> str:
        """The text so far, without what may become a stop string; after the end all of it."""
        self._decode()
        return self._text

    def _decode(self) -> None:
        """Decodes the tokens that were not decoded before, and looks for stop strings."""
        if self._detokeniser is None:
            return
        new = self.token_ids[self._num_decoded :]
        if new:
            self._num_decoded = len(self.token_ids)
            self._extend(self._detokeniser.add_all(new))
        if self.reason is not None and not self._is_complete:
            self._is_complete = True
            self._extend(self._detokeniser.finish())
            self._text += self._search.finish()

    def _extend(self, piece: str) -> None:
        was_found = self._search.found is not None
        self._text += self._search.add(piece)
        if self._search.found is not None and not was_found and self.reason in (None, "length"):
            self.reason, self.stop = "stop", self._search.found

    def _end(self, reason: Reason, stop: int | None = None) -> None:
        self.reason, self.stop = reason, stop
        if self._has_stops:
            # The last tokens may complete a stop string.
            self._decode()
