"""Prompts as they are given, read into token ids."""

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from refold.checkpoint.companions import offers_tokenizer
from refold.checkpoint.locate import Source, locate
from refold.data.tokens import require_known_tokens
from refold.errors import RefoldError
from refold.generation.prompts import Messages, encode_prompt
from refold.modeling.load import load_tokenizer

AnyPrompt = str | Sequence[int] | Messages
"""A text, token ids, or the messages of a conversation."""


def list_prompts(prompts: Any) -> list[AnyPrompt]:
    """Returns one prompt as a list of one, and several as they are."""
    if isinstance(prompts, str):
        return [prompts]
    given = list(prompts)
    if given and all(isinstance(each, int) for each in given):
        return [given]
    if given and all(isinstance(each, dict) for each in given):
        return [given]
    return given


def find_tokenizer(model: Any) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of a folder or hub id; None if it has none."""
    source = model if isinstance(model, Source) else locate(model)
    return load_tokenizer(source) if offers_tokenizer(source.fetch_companions()) else None


def read_prompt(
    prompt: AnyPrompt, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, chat: bool = False
) -> list[int]:
    """Returns the token ids of a prompt.

    Args:
        prompt: The prompt.
        tokenizer: Of the model; None: prompts are token ids.
        vocab_size: Number of tokens that the model knows.
        chat: Whether to apply the chat template to a text; to conversations it always applies.

    Raises:
        RefoldError: The prompt is empty, holds an unknown token, or is a text without a tokenizer.
    """
    if not isinstance(prompt, str) and all(isinstance(each, int) for each in prompt):
        ids = [int(cast("int", each)) for each in prompt]
        if not ids:
            raise RefoldError("prompt: at least one token is required (got none)")
    else:
        if tokenizer is None:
            raise RefoldError("prompt: token ids are required, because the engine has no tokenizer (got a text)")
        ids = encode_prompt(tokenizer, cast("Any", prompt), chat or not isinstance(prompt, str))
    require_known_tokens("prompt", ids, vocab_size)
    return ids
