"""Prompts as tokens, and tokens as text, in a bounded number of threads."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from refold.data.chat_template import TemplateFault, apply_chat_template
from refold.errors import RefoldError
from refold.generation.prompts import encode_prompt
from refold.serve.faults import ApiFault, without_paths
from refold.serve.forms import AnswerForm, FormChecks
from refold.serve.served import ServedModel

Made = TypeVar("Made")
SHORT = 20_000
"""Characters of a prompt that the threads for short ones take; longer ones wait for each other."""
_NUM_THREADS = 2


class TokenThreads:
    """Threads for tokenizers: two for short texts, one for long ones, one for forms, so that these stall nobody.

    Attributes:
        forms: The forms that have been checked.
    """

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="refold-tokens")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="refold-long-tokens")
        self._forms = ThreadPoolExecutor(1, thread_name_prefix="refold-forms")
        self.forms = FormChecks()

    async def run(self, num_characters: int, work: Callable[[], Made]) -> Made:
        """Runs work over so many characters."""
        pool = self._short if num_characters <= SHORT else self._long
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    async def check_form(self, form: AnswerForm) -> None:
        """Checks a form that an answer is held to, if it is a new one.

        Raises:
            ApiFault: It does not compile, or only at great cost.
        """
        if not self.forms.knows(form):
            await asyncio.get_running_loop().run_in_executor(self._forms, self.forms.require, form)

    def close(self) -> None:
        """Drops work that has not begun."""
        for pool in (self._short, self._long, self._forms):
            pool.shutdown(wait=False, cancel_futures=True)


class Prompter:
    """Turns the prompts of one model into tokens.

    Args:
        served: The model.
        threads: Where tokenizers run.
    """

    def __init__(self, served: ServedModel, threads: TokenThreads):
        self._served, self._threads = served, threads
        self._texts: dict[int, tuple[str, bytes]] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ApiFault: There is none.
        """
        if self._served.tokenizer is None:
            raise ApiFault(
                400, "prompt: token ids are required, because the model has no tokenizer (got a text)", param="prompt"
            )
        return self._served.tokenizer

    @property
    def template(self) -> str:
        """Text of the chat template; empty: there is none."""
        found = None if self._served.tokenizer is None else self._served.tokenizer.chat_template
        return found if isinstance(found, str) else ""

    async def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of texts that begin documents.

        Raises:
            ApiFault: One has no tokens, or more characters than the context has room for.
        """
        tokenizer = self.tokenizer
        self._require_room(max(map(len, texts)), "prompt")

        def work() -> list[list[int]]:
            return [encode_prompt(tokenizer, text, chat=False) for text in texts]

        try:
            return await self._threads.run(sum(map(len, texts)), work)
        except RefoldError as error:
            raise ApiFault(400, without_paths(str(error)), param="prompt", code="empty_prompt") from None

    async def encode_chat(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> list[int]:
        """Returns the tokens of a conversation.

        Args:
            messages: As chat templates take them.
            options: Further variables of the template.

        Raises:
            ApiFault: There is no template, or it refuses the messages.
        """
        tokenizer = self.tokenizer
        if not self.template:
            raise ApiFault(
                400,
                "messages: a chat template is required, and this model has none; use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        num_characters = sum(len(str(each)) for each in messages)
        self._require_room(num_characters // 2, "messages")

        def work() -> Any:
            return apply_chat_template(tokenizer, messages, add_generation_prompt=True, return_dict=True, **options)

        try:
            found = await self._threads.run(num_characters, work)
        except TemplateFault as error:
            reason = without_paths(str(error))
            raise ApiFault(
                400,
                f"messages: messages that the chat template takes are required ({reason})",
                param="messages",
                code="chat_template",
            ) from None
        if not found["input_ids"]:
            raise ApiFault(400, "messages: some text is required (the chat template gave none)", param="messages")
        return list(found["input_ids"])

    async def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, with special ones."""
        tokenizer = self.tokenizer
        return str(
            await self._threads.run(
                4 * len(tokens), lambda: tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
            )
        )

    def piece(self, token: int) -> tuple[str, bytes]:
        """Returns one token as text and as bytes; a token within a character has a replacement character as text."""
        if self._served.tokenizer is None:
            name = f"token_id:{token}"
            return name, name.encode()
        found = self._texts.get(token)
        if found is None:
            made = _bytes_of(self.tokenizer, token, self._is_byte_level, self.is_special(token))
            found = self._texts[token] = made.decode("utf-8", "replace"), made
        return found

    def is_special(self, token: int) -> bool:
        """Says whether a token has no text."""
        return token in self._special

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    def special_token(self, text: str) -> int | None:
        """Returns the special token that is written as a text; None: there is none."""
        for token, added in self.tokenizer.added_tokens_decoder.items():
            if added.special and added.content == text:
                return token
        return None

    @cached_property
    def _is_byte_level(self) -> bool:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        return isinstance(decoder, decoders.ByteLevel) or "ByteLevel" in str(decoder)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    def _require_room(self, num_characters: int, param: str) -> None:
        context = self._served.link.facts.max_context
        most = context * self._longest
        if num_characters > most:
            raise ApiFault(
                400,
                f"{param}: must fit the model's {context} tokens, which are at most {most:,} characters "
                f"(got {num_characters:,})",
                param=param,
                code="context_length_exceeded",
            )


def _byte_decoder() -> dict[str, int]:
    """Returns the bytes of the characters that byte-level vocabularies write them as (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_decoder()


def _bytes_of(tokenizer: PreTrainedTokenizerBase, token: int, is_byte_level: bool, is_special: bool) -> bytes:
    piece = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(piece, str):
        return b""
    if is_special:
        return piece.encode()
    if is_byte_level and all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode("utf-8", "replace")
