"""Streams of new tokens, and of their text."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_PIECES = 6


class Detokeniser:
    """Decodes new tokens one by one into pieces of text.

    A token decoded alone loses the space at its front in some vocabularies, and the bytes of characters that take
    several tokens. So each token is decoded together with the tokens before it, and the text of these is removed. A
    piece that ends inside a character waits for the rest.

    Args:
        tokenizer: Tokenizer of the model; special tokens give no text.
        prompt: Token ids before the new tokens; their text is not returned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # Each entry is whole characters, so that dropping the oldest entry never cuts a character.
        self._given: deque[list[int]] = deque(maxlen=_CONTEXT_PIECES)
        self._given.append(self._end_of(list(prompt)))
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """Takes the next token and returns the text that is complete now: none, or that of several tokens."""
        self._waiting.append(token)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._given.append(self._waiting)
        self._waiting = []
        return text

    def add_all(self, tokens: Sequence[int]) -> str:
        """Takes several tokens at the cost of one, and returns the text that `add` would return for them, joined."""
        self._waiting.extend(tokens[:-1])
        return self.add(tokens[-1]) if tokens else ""

    def finish(self) -> str:
        """Returns the text of waiting tokens; an incomplete character becomes replacement characters."""
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


class TokenStream(BaseStreamer):
    """Iterator over the new tokens of one sequence, as a context manager.

    Leaving the body stops the generation after the current token. An error of the generation is raised in the
    iteration.

    Args:
        work: Runs `generate` with a streamer and a stopping criterion.
    """

    def __init__(self, work: Callable[[BaseStreamer, StoppingCriteria], Any]):
        self._work = work
        # None marks the end of the stream.
        self._queue: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._has_prompt = False
        self._thread = threading.Thread(target=self._run, name="refold-generate", daemon=True)

    def __enter__(self) -> "TokenStream":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[int]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def put(self, value: torch.Tensor) -> None:
        """Receives token ids from `generate`: first the prompt, then one new token at a time."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        for token in value.reshape(-1).tolist():
            self._queue.put(token)

    def end(self) -> None:
        """Does nothing: the end of the stream is marked when the thread ends."""

    def _run(self) -> None:
        try:
            self._work(self, _Stopped(self._stopped))
        except BaseException as error:
            self._queue.put(error)
        finally:
            self._queue.put(None)


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device, dtype=torch.bool)
