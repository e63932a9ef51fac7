"""Documents of a batch, and the attention masks that keep them apart."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from refold.errors import RefoldError
from refold.modeling.cache_name import CACHE_NAME
from refold.modeling.configuration import RefoldConfig
from refold.modeling.padding import first_tokens


def _count_tokens(
    attention_mask: Tensor | None, past_length: int | Tensor, positions: Int[Tensor, "B T"]
) -> Int[Tensor, "B T"]:
    """Returns the positions that tokens have if every row is one document, possibly left-padded."""
    tokens = positions.shape[1]
    if attention_mask is not None:
        return (attention_mask.cumsum(-1) - 1)[:, -tokens:].to(positions.device)
    return (torch.arange(tokens, device=positions.device) + past_length).expand_as(positions)


def document_starts(
    positions: Int[Tensor, "B T"] | None,
    attention_mask: Tensor | None,
    past_length: int | Tensor,
    asks_device: bool = True,
) -> Int[Tensor, "B T"] | None:
    """Returns, for each token, the slot at which its document begins, or None where every row is one document.

    Slots are counted from the first token ever put into the cache. A token whose position is not its predecessor's plus
    one begins a document. The first token of a call, at slot `s` with position `p`, continues the document that begins
    at slot `s - p`. The rule needs no memory of earlier calls, so packed prompts stay separate with a cache too.

    Args:
        positions: Position ids, or None: one document per row.
        attention_mask: `[B, past + T]` with zeros at padding, or None. Masks of other ranks are taken as they are.
        past_length: Number of slots already in the cache.
        asks_device: Whether to check if every row is one document, which waits for the device; False: assume that
            some rows hold several.
    """
    if positions is None or (attention_mask is not None and attention_mask.ndim != 2):
        return None
    real: Bool[Tensor, "B T"] | bool = True
    if attention_mask is not None:
        if attention_mask.shape[1] < positions.shape[1]:
            return None
        attention_mask = attention_mask.long()
        real = attention_mask[:, -positions.shape[1] :].bool()
    if asks_device and not torch.compiler.is_compiling():
        expected = _count_tokens(attention_mask, past_length, positions)
        if bool(((positions == expected) | ~torch.as_tensor(real, device=positions.device)).all()):
            return None
    slots = (torch.arange(positions.shape[1], device=positions.device) + past_length).expand_as(positions)
    begins = positions[:, 1:] != positions[:, :-1] + 1
    reached = (slots[:, :1] - positions[:, :1]).clamp(min=0)
    if attention_mask is not None:
        real = attention_mask.to(positions.device).bool()
        counted = positions == _count_tokens(attention_mask, past_length, positions)
        current = real[:, -positions.shape[1] :]
        begins = begins & current[:, 1:] & (current[:, :-1] | ~counted[:, 1:])
        # `generate` continues positions from the one it gave the last padding: such a row stays one document.
        is_padding = ~real & (torch.arange(real.shape[1], device=real.device) >= reached)
        is_padding = is_padding & (torch.arange(real.shape[1], device=real.device) <= slots[:, :1])
        reached = reached.masked_fill(is_padding.any(dim=1, keepdim=True) | counted[:, :1], 0)
    starts = torch.cat((reached, torch.where(begins, slots[:, 1:], 0)), dim=1)
    return starts.cummax(dim=1).values


def state_resets(
    document_starts: Int[Tensor, "B T"] | None,
    attention_mask: Tensor | None,
    past_length: int | Tensor,
    tokens: int,
    asks_device: bool = True,
) -> Bool[Tensor, "B T"] | None:
    """Returns a mask of the tokens at which recurrent states are emptied.

    These are the first token of each document and the first token of a padded row. None: no state is emptied in this
    call, as in a call that continues unpadded rows of one document each.

    Args:
        document_starts: From `document_starts`.
        attention_mask: `[B, past + T]` or `[B, T]` with zeros at padding, or None.
        past_length: Number of slots already in the cache.
        tokens: T.
        asks_device: Whether to check if there is padding, which waits for the device; False: assume that there is.
    """
    found = None
    if document_starts is not None:
        slots = torch.arange(tokens, device=document_starts.device) + past_length
        found = document_starts == slots
    is_compiling = torch.compiler.is_compiling()
    if attention_mask is None or attention_mask.ndim != 2 or (is_compiling and tokens == 1):
        return found
    # The slice includes the token before this call, because padding may end with an earlier call.
    if is_compiling or not asks_device or not bool(attention_mask[:, -tokens - 1 :].all()):
        begins = first_tokens(attention_mask, tokens)
        if attention_mask.shape[1] == tokens:
            # A mask of this call alone does not tell whether tokens came before; without any there is no state.
            begins = begins & (torch.arange(tokens, device=begins.device) > 0)
        found = begins if found is None else found | begins
    return found


def holds_documents(positions: Tensor | None, attention_mask: Tensor | None, cache: Any) -> bool | None:
    """Returns whether rows of a sequence that is being generated hold several documents.

    Args:
        positions: `[B, past + T]`, of all tokens so far and the next.
        attention_mask: `[B, past + T]` with zeros at padding, or None.
        cache: Holds all tokens but the next.

    Returns:
        None where the positions are not those of the whole sequence, so that the answer is unknown.
    """
    if torch.compiler.is_compiling() or positions is None or positions.ndim != 2 or not isinstance(cache, Cache):
        return None
    if cache.get_seq_length() != positions.shape[1] - 1:
        return None
    return document_starts(positions, attention_mask, 0) is not None


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
            (as `generate` prepares for static caches), or None.
        cache: Cache, or None.
        past_length: Slots already in the cache.
        document_starts: As `document_starts` gives them.
        reads_mask: Whether transformers may check if the mask can be dropped, which waits for the device.

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
    """Returns the `[B, tokens]` padding mask from the mask that a user or `generate` gave.

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
    """Refuses packed documents that flash attention mixes: it reads position ids for one uncached row only."""
    uses_flash = "flash" in (config._attn_implementation or "")
    if uses_flash and (cache is not None or hidden_states.shape[0] > 1):
        raise RefoldError(
            f"attn_implementation: packed documents need sdpa, eager or flex_attention with a cache or more than one "
            f"row (got {config._attn_implementation}); load the model with attn_implementation='sdpa'"
        )
