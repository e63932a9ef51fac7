"""Limits of a generation: the model's positions, and its end tokens."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refold.errors import RefoldError
from refold.generation.sampling import DEFAULT_NEW_TOKENS, Sampling
from refold.modeling.configuration import RefoldConfig


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Returns the end tokens of a model: those of its generation config, or the tokenizer's, if there is one."""
    settings = getattr(model, "generation_config", None)
    return listed(getattr(settings, "eos_token_id", None)) or listed(getattr(tokenizer, "eos_token_id", None))


def require_known_biases(sampling: Sampling, vocab_size: int) -> None:
    """Checks that the tokens of `logit_bias` are in the vocabulary.

    Raises:
        RefoldError: One is not.
    """
    for token in sampling.biases:
        if token >= vocab_size:
            raise RefoldError(
                f"logit_bias: token {token} is out of range (vocabulary of {vocab_size} tokens: 0..{vocab_size - 1})"
            )


def position_limit(model: PreTrainedModel) -> int | None:
    """Returns the number of positions of a model; None if all its depths are recurrent."""
    if isinstance(model.config, RefoldConfig):
        blueprint = model.config.read_blueprint()
        mixers = [blueprint.mixers[depth.mixer].mixer for depth in blueprint.depths if depth.mixer is not None]
        if mixers and all(mixer.is_recurrent for mixer in mixers):
            return None
    return getattr(model.config, "max_position_embeddings", None)


def new_tokens_room(longest: int, limit: int | None, sampling: Sampling) -> int:
    """Returns the number of new tokens after a prompt.

    Args:
        longest: Tokens of the longest prompt.
        limit: Result of `position_limit`.
        sampling: Settings of the request.

    Raises:
        RefoldError: Prompt and new tokens do not fit the positions.
    """
    wanted = sampling.max_new_tokens
    if not limit:
        return DEFAULT_NEW_TOKENS if wanted is None else wanted
    require_room(longest, limit, sampling, f"the model's {limit} positions")
    if wanted is not None and longest + wanted > limit:
        raise RefoldError(
            f"max_new_tokens: must be at most {limit - longest} after a prompt of {longest} tokens, so that all "
            f"fit the model's {limit} positions (got {wanted})"
        )
    return min(DEFAULT_NEW_TOKENS, limit - longest) if wanted is None else wanted


def require_room(length: int, limit: int, sampling: Sampling, room: str) -> None:
    """Checks that a prompt leaves room for one new token, if any is wanted.

    Args:
        length: Tokens of the prompt.
        limit: Most tokens of a prompt and its continuation.
        sampling: Settings of the request.
        room: Name of the limit, for the message.

    Raises:
        RefoldError: The prompt is too long.
    """
    least = 0 if sampling.max_new_tokens == 0 else 1
    if length + least > limit:
        raise RefoldError(
            f"prompt: must be at most {limit - least} tokens, so that {'one more' if least else 'it'} fits {room} "
            f"(got {length}); shorten it"
        )


def listed(tokens: Any) -> list[int]:
    """Returns the token ids of a setting that may be one, several or None."""
    if tokens is None:
        return []
    return list(tokens) if isinstance(tokens, (list, tuple)) else [tokens]
