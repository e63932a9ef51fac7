"""What a depth with a recurrent mixer remembers between calls, kept in transformers' cache."""

from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from refold.errors import RefoldError
from refold.ops.documents import number_documents


class StateView(nn.Module):
    """One depth's place in the cache; no weights."""

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def extra_repr(self) -> str:
        return f"layer_idx={self.layer_idx}"


class Memory:
    """One depth's recurrent state and last inputs. Without a cache everything is new and nothing is kept.

    Args:
        cache: Of the model, indexed by depth; or None.
        layer_idx: Which depth.

    Raises:
        RefoldError: The cache was not made for this model: it keeps keys and values here.
    """

    def __init__(self, cache: Cache | None, layer_idx: int):
        self._layer: LinearAttentionLayer | None = None
        self._cache = cache
        if cache is None:
            return
        layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
        if not isinstance(layer, LinearAttentionLayer):
            raise RefoldError(
                f"cache: a cache made for this model's config is required (got {type(layer).__name__} at "
                f"depth {layer_idx}); use DynamicCache(config=model.config)"
            )
        self._layer = layer

    @property
    def is_kept(self) -> bool:
        """Whether what is written lasts longer than this call."""
        return self._layer is not None

    def state(self) -> Tensor | None:
        """Returns the recurrent state that earlier calls left, or None."""
        if self._layer is None or not self._layer.has_previous_state[0]:
            return None
        return self._layer.recurrent_states[0]

    def keep_state(self, state: Tensor) -> None:
        """Keeps the state after this call's last token."""
        if self._cache is not None and self._layer is not None:
            # Its own refusal comes after layers before this one were cropped, and asks for what would not help.
            self._cache.crop = _refuse_to_crop  # pyright: ignore[reportAttributeAccessIssue]
            if not self._layer.has_previous_state[0]:
                # What marks a layer as used is its last inputs; a mixer without any keeps an empty one.
                self._layer.update_conv_state(state.new_zeros(len(state), 1, 1))
            self._layer.update_recurrent_state(state)

    def exchange(
        self, inputs: Float[Tensor, "B T C"], width: int, resets: Bool[Tensor, "B T"] | None
    ) -> Float[Tensor, "B W C"] | None:
        """Returns the `width` inputs before these, oldest first, and keeps the last `width` of all.

        Zeros stand where there were none. Of what is kept only the document that goes on is left, the rest is zeros as
        well. None where there was nothing before.
        """
        if self._layer is None:
            return None
        layer = self._layer
        before = layer.conv_states[0] if layer.has_previous_state[0] else None
        columns = inputs.transpose(1, 2)
        if not layer.is_conv_states_initialized[0]:
            # Sizes are taken from what comes first, which may be shorter than the width.
            layer.lazy_initialization(conv_states=columns, conv_kernel_size=width)
        earlier = None if before is None else before.transpose(1, 2).clone()
        if resets is not None:
            numbers = number_documents(resets, resets.shape[0], resets.shape[1], resets.device)
            columns = columns * (numbers == numbers[:, -1:]).unsqueeze(1)
            if before is not None:
                before.copy_(before * (numbers[:, -1] == 0)[:, None, None])
        layer.update_conv_state(columns)
        return earlier


def _refuse_to_crop(*_: Any) -> NoReturn:
    raise RefoldError(
        "crop: a cache of keys and values alone is required (got recurrent states, which cannot be taken back); read "
        "the shorter text anew, or go on from a copy.deepcopy of the cache from before"
    )


def count_tokens(cache: Cache | None, counting_depth: int | None, hidden_states: Float[Tensor, "B T D"]) -> None:
    """Lets a cache without keys and values count the tokens of this call.

    Args:
        cache: Of the model, or None.
        counting_depth: The depth whose cache layer has a window of one token beside its state; None: there is none.
        hidden_states: Of this call, for their sizes.
    """
    if cache is not None and counting_depth is not None:
        place = hidden_states[:, None, :, :1]
        cache.update(torch.zeros_like(place), torch.zeros_like(place), counting_depth)
