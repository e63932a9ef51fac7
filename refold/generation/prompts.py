"""Prompts as token ids."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refold.data.chat_template import TemplateFault, apply_chat_template
from refold.data.encoder import document_start_token
from refold.errors import RefoldError

Messages = Sequence[Mapping[str, Any]]
"""A conversation; each message is `{"role": ..., "content": ...}`."""


class PromptBatch(NamedTuple):
    """Prompts padded on the left to the longest.

    Attributes:
        input_ids: Token ids.
        attention_mask: 0 at padding.
    """

    input_ids: Int64[Tensor, "B T"]
    attention_mask: Int64[Tensor, "B T"]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, chat: bool) -> list[int]:
    """Returns the token ids of a prompt.

    A plain prompt has the special tokens that the tokenizer adds before a text, as in transformers and in other
    engines, but no end token that it adds after it. An empty prompt is the token that begins a document. With `chat`
    the tokenizer's chat template formats the conversation.

    Raises:
        RefoldError: The prompt has no tokens, there is no chat template, or the template refuses these messages.
    """
    if isinstance(prompt, str) and not chat:
        found = list(tokenizer(prompt, verbose=False)["input_ids"])
        end: Any = tokenizer.eos_token
        if len(found) > 1 and found[-1] == tokenizer.eos_token_id and not prompt.endswith(end):
            found.pop()
        if not found and (start := document_start_token(tokenizer)) is not None:
            found = [start]
        if not found:
            raise RefoldError("prompt: some text is required (got none, and the tokenizer has no start token)")
        return found
    if not tokenizer.chat_template:
        raise RefoldError(
            "chat: a chat template is required (the tokenizer has none); use a plain prompt, or a model made for chat"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(each) for each in prompt]
    try:
        encoded: Any = apply_chat_template(tokenizer, messages, add_generation_prompt=True, return_dict=True)
    except TemplateFault as error:
        raise RefoldError(f"chat: messages that the chat template takes are required ({error})") from error
    return list(encoded["input_ids"])


def pad_left(prompts: Sequence[Sequence[int]], padding: int) -> PromptBatch:
    """Pads prompts on the left, because new tokens follow on the right."""
    longest = max(map(len, prompts))
    return PromptBatch(
        torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]),
        torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    )


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the token ids of a text that continues another: without a start token and without an added space.

    Some tokenizers add a space before every text. So a line break is put before the text, and its tokens are removed
    afterwards.
    """
    before, joined, alone = (
        list(tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"])
        for each in ("\n", "\n" + text, text)
    )
    return joined[len(before) :] if joined[: len(before)] == before else alone
