"""Choices of `/v1/completions`."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from refold.engine.results import TokenLogprob
from refold.serve.answer_shapes import refold_tokens
from refold.serve.asking import ChoicePart
from refold.serve.bodies import CompletionBody
from refold.serve.prompting import Prompter

COMPLETION = "text_completion"


@dataclass
class _Logprobs:
    names: list[str] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    tops: list[dict[str, float] | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add(self, name: str, logprob: float | None, tops: dict[str, float] | None, offset: int) -> None:
        self.names.append(name)
        self.values.append(logprob)
        self.tops.append(tops if tops is None or logprob is None else tops | {name: logprob})
        self.offsets.append(offset)


class CompletionWriter:
    """Writes the choices of one request, in pieces or whole.

    Args:
        body: The request.
        prompter: Of the model.
        prompts: Tokens of the prompts.
        echoes: Text of each prompt, where choices begin with it.
    """

    def __init__(
        self,
        body: CompletionBody,
        prompter: Prompter,
        prompts: Sequence[Sequence[int]],
        echoes: list[str] | None = None,
    ):
        self._body, self._prompter, self._prompts = body, prompter, prompts
        self._echoes, self._n = echoes, body.n or 1
        self._lengths: dict[int, int] = {}

    def choice(self, index: int, part: ChoicePart) -> dict[str, Any]:
        """Returns the next piece of a choice, in the shape of a whole one."""
        has_prompt = self._echoes is not None and index not in self._lengths
        echo = self._echoes[index // self._n] if self._echoes is not None and has_prompt else ""
        prompt = self._prompts[index // self._n] if has_prompt else ()
        start = self._lengths.get(index, 0) + len(echo)
        self._lengths[index] = start + len(part.text)
        written: dict[str, Any] = {
            "index": index,
            "text": echo + part.text,
            "logprobs": None if self._body.logprobs is None else self._logprobs(part, start, prompt, echo),
            "finish_reason": part.reason,
        }
        if self._body.return_tokens:
            tokens = refold_tokens(part, self._prompter, self._body.logprobs is not None)
            written["refold_tokens"] = [{"id": None, "text": echo, "depth": None}] * bool(echo) + tokens
        return written

    def _logprobs(self, part: ChoicePart, start: int, prompt: Sequence[int], echo: str) -> dict[str, Any]:
        told = _Logprobs()
        self._add_prompt(told, prompt, part.prompt or (), echo)
        for token, text in part.tokens:
            if token is not None:
                told.add(self._name(token.token), token.logprob, self._tops(token.alternatives), start)
            start += len(text)
        return {
            "tokens": told.names,
            "token_logprobs": told.values,
            "top_logprobs": told.tops,
            "text_offset": told.offsets,
        }

    def _add_prompt(self, told: "_Logprobs", prompt: Sequence[int], scores: Sequence[Any], echo: str) -> None:
        """Adds the tokens of the prompt; the first one has no log-probability."""
        decoder, start = codecs.getincrementaldecoder("utf-8")("ignore"), 0
        for token, scored in zip(prompt, scores, strict=bool(scores)):
            if scored is None:
                told.add(self._name(token), None, None, start)
            else:
                told.add(self._name(token), scored.logprob, self._tops(scored.alternatives), start)
            text, raw = self._prompter.piece(token)
            if not self._prompter.is_special(token):
                start += len(decoder.decode(raw))
            elif echo.startswith(text, start):
                # One that the tokenizer has put before a text is not in the text.
                start += len(text)

    def _tops(self, alternatives: Sequence[TokenLogprob] | None) -> dict[str, float]:
        return {self._name(each.token): each.logprob for each in alternatives or ()}

    def _name(self, token: int) -> str:
        text, raw = self._prompter.piece(token)
        # As in OpenAI's API, so that tokens within a character have different names.
        return text if text.encode() == raw else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
