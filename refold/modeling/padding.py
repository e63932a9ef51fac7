"""Padding as recurrent mixers see it: moved before the tokens of its row, where it cannot touch their state."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refold.errors import RefoldError
from refold.nn.mixers.batch import DepthInputs


def padding_first(
    attention_mask: Tensor | None, past_length: int | Tensor, tokens: int, has_cache: bool, asks_device: bool = True
) -> Int[Tensor, "B T"] | None:
    """Returns an order of a call's tokens that puts padding first; None where the given order serves.

    A recurrence takes in every token of a row, so padding between or after tokens would change the state that later
    tokens read.

    Args:
        attention_mask: `[B, past + T]` or `[B, T]` with zeros at padding, or None.
        past_length: Number of slots already in the cache.
        tokens: T.
        has_cache: Whether the state after the last token is kept. Without a cache, padding that only tokens of padding
            follow changes nothing.
        asks_device: Whether to check if padding follows a token, which waits for the device; False: assume that it
            does in calls of several tokens.

    Raises:
        RefoldError: Earlier calls left a state, and padding follows a token of its row in this call.
    """
    asks_device = asks_device and not torch.compiler.is_compiling()
    if attention_mask is None or attention_mask.ndim != 2 or (not asks_device and tokens == 1):
        return None
    real = attention_mask.bool()
    current = real[:, -tokens:]
    if asks_device:
        if bool(current.all()):
            return None
        is_late = ~current & _seen(real)[:, -tokens:]
        if not has_cache:
            is_late = is_late & _seen(current.flip(1)).flip(1)
        if not bool(is_late.any()):
            return None
        if bool((torch.as_tensor(past_length) > 0) & _goes_on(real, current)):
            raise RefoldError(
                "attention_mask: padding before the tokens of a row is required where mixers keep a state and a cache "
                "goes on (got padding after tokens); set padding_side='left' or pad in the first call alone"
            )
    return current.int().argsort(dim=1, stable=True)


def first_tokens(attention_mask: Tensor, tokens: int) -> Bool[Tensor, "B T"]:
    """Returns a mask of the first token of each row after its padding."""
    real = attention_mask.bool()
    return (real & (real.cumsum(1) == 1))[:, -tokens:]


def in_order(
    order: Int[Tensor, "B T"], hidden_states: Float[Tensor, "B T D"], inputs: DepthInputs
) -> tuple[Float[Tensor, "B T D"], DepthInputs]:
    """Returns the stream and the rotations in another order of tokens; `resets` are in that order already."""
    rotation = inputs.rotation
    if rotation is not None:
        rotation = _pick(rotation[0], order), _pick(rotation[1], order)
    return _pick(hidden_states, order), inputs._replace(rotation=rotation)


def as_given(order: Int[Tensor, "B T"], ordered: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """Returns tokens that stand in `order` in their original order."""
    return _pick(ordered, order.argsort(dim=1))


def _pick(x: Tensor, order: Int[Tensor, "B T"]) -> Tensor:
    index = order.view(*order.shape, *[1] * (x.dim() - 2))
    return x.expand(order.shape[0], *x.shape[1:]).gather(1, index.expand(-1, -1, *x.shape[2:]))


def _seen(real: Bool[Tensor, "B S"]) -> Bool[Tensor, "B S"]:
    """Returns a mask that is true from the first token of a row on."""
    return real.cumsum(1) > 0


def _goes_on(real: Bool[Tensor, "B S"], current: Bool[Tensor, "B T"]) -> Tensor:
    """Returns whether a row may have had tokens in earlier calls; true if the mask covers this call alone."""
    earlier = real[:, : real.shape[1] - current.shape[1]]
    return earlier.any() if earlier.shape[1] else torch.tensor(True, device=real.device)
