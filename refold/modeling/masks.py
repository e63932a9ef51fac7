"""Attention masks of one forward pass: one for each window that occurs, with documents kept apart."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from refold.errors import RefoldError
from refold.modeling.cache_name import CACHE_NAME
from refold.modeling.configuration import RefoldConfig

LAYER_TYPES = ("full_attention", "sliding_attention")
_SKIP = "allow_is_causal_skip"
_ALWAYS_BUILD = {_SKIP: False} if _SKIP in signature(create_causal_mask).parameters else {}


def build_masks(
    config: RefoldConfig,
    windows: Mapping[int | None, int],
    hidden_states: Float[Tensor, "B T D"],
    attention_mask: Tensor | Mapping[str, Any] | None,
    cache: Cache | None,
    past_length: int | Tensor,
    document_starts: Int[Tensor, "B T"] | None,
    reads_mask: bool = True,
) -> dict[int | None, Any]:
    """Returns a mask, in the form the configured back-end wants, for each window.

    Args:
        config: Names the attention back-end and the window.
        windows: Window (None: whole context) to the first depth that has it, whose cache entry gives the sizes.
        hidden_states: Only its batch, length, dtype and device matter.
        attention_mask: `[B, past + T]` padding mask, a ready 4-dimensional mask, one ready mask for each layer type
            (what `generate` prepares for static caches), or None.
        cache: Cache, or None.
        past_length: Slots already in the cache.
        document_starts: As `document_starts` gives them.
        reads_mask: Let transformers look whether the mask can be left out, which waits for the device.

    Raises:
        RefoldError: Packed documents with a flash-attention back-end that could not keep them apart.
    """
    if isinstance(attention_mask, Mapping):
        return {window: attention_mask[LAYER_TYPES[window is not None]] for window in windows}
    overlay = None
    if document_starts is not None:
        _refuse_leaking_backend(config, hidden_states, cache)
        starts = document_starts.expand(hidden_states.shape[0], -1)

        def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key >= starts[batch, query - past_length]

        overlay = same_document

    masks, named = {}, cast("Any", {CACHE_NAME: cache})
    if not reads_mask and attention_mask is not None:
        named |= _ALWAYS_BUILD
    for window, depth in windows.items():
        create = create_causal_mask if window is None else create_sliding_window_causal_mask
        masks[window] = create(
            config=config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            **named,
            and_mask_function=overlay,
            layer_idx=depth,
        )
    return masks


def paged_masks(attention_mask: Any, windows: Mapping[int | None, int]) -> dict[int | None, Any]:
    """Returns the masks of continuous batching for each window.

    Args:
        attention_mask: `[1, 1, T, S]`, one of those for each layer type, or None.
        windows: Window to a depth that has it.
    """
    if isinstance(attention_mask, Mapping):
        return {window: attention_mask[LAYER_TYPES[window is not None]] for window in windows}
    return dict.fromkeys(windows, attention_mask)


def padding_mask(attention_mask: Any) -> Tensor | None:
    """Returns the `[B, tokens]` mask of what a user or `generate` gave.

    Raises:
        RefoldError: A ready mask of another form, which recurrent mixers cannot follow.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = attention_mask.get("linear_attention")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise RefoldError(
            f"attention_mask: [batch, tokens] is required where mixers keep a state (got {attention_mask.ndim} "
            f"dimensions); mark documents by position_ids"
        )
    return attention_mask


def _refuse_leaking_backend(config: RefoldConfig, hidden_states: Tensor, cache: Cache | None) -> None:
    """Flash attention reads packed documents off the position ids, which it does for one uncached row only."""
    uses_flash = "flash" in (config._attn_implementation or "")
    if uses_flash and (cache is not None or hidden_states.shape[0] > 1):
        raise RefoldError(
            f"attn_implementation: packed documents need sdpa, eager or flex_attention with a cache or more than one "
            f"row (got {config._attn_implementation}); load the model with attn_implementation='sdpa'"
        )
