"""Which tokens of a row belong to one document, derived from their positions."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import Cache

from refold.modeling.padding import first_tokens


def _count_tokens(
    attention_mask: Tensor | None, past_length: int | Tensor, positions: Int[Tensor, "B T"]
) -> Int[Tensor, "B T"]:
    """The positions tokens have when every row is one, possibly left-padded, document."""
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
    one begins a document. The first token of a call continues the document its position reaches back into: at slot `s`
    with position `p` it began at `s - p`. That needs no memory of earlier calls, so packed prompts stay apart with a
    cache too.

    Args:
        positions: Position ids, or None: one document per row.
        attention_mask: `[B, past + T]` with zeros at padding, or None. Masks of other ranks are taken as they are.
        past_length: Number of slots already in the cache.
        asks_device: Look whether every row is one document, which waits for the device; False: assume that some are
            not.
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
        # `generate` counts on from the position it gave the last padding: such a row stays one document.
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
    """Returns where recurrent states are emptied: where a document begins, and at the first token of a padded row.

    None where that is nowhere, which on an unpadded row is the case from the second token on.

    Args:
        document_starts: From `document_starts`.
        attention_mask: `[B, past + T]` or `[B, T]` with zeros at padding, or None.
        past_length: Number of slots already in the cache.
        tokens: T.
        asks_device: Look whether there is padding, which waits for the device; False: take it that there is.
    """
    found = None
    if document_starts is not None:
        slots = torch.arange(tokens, device=document_starts.device) + past_length
        found = document_starts == slots
    is_compiling = torch.compiler.is_compiling()
    if attention_mask is None or attention_mask.ndim != 2 or (is_compiling and tokens == 1):
        return found
    # With the token before: padding may end where an earlier call did.
    if is_compiling or not asks_device or not bool(attention_mask[:, -tokens - 1 :].all()):
        begins = first_tokens(attention_mask, tokens)
        if attention_mask.shape[1] == tokens:
            # Such a mask does not tell whether tokens came before; where none did, there is no state to empty.
            begins = torch.cat((torch.zeros_like(begins[:, :1]), begins[:, 1:]), dim=1)
        found = begins if found is None else found | begins
    return found


def holds_documents(positions: Tensor | None, attention_mask: Tensor | None, cache: Any) -> bool | None:
    """Returns whether rows of a sequence that is being generated hold several documents.

    Args:
        positions: `[B, past + T]`, of all tokens so far and the next.
        attention_mask: `[B, past + T]` with zeros at padding, or None.
        cache: Holds all tokens but the next.

    Returns:
        None where that cannot be said, because the positions are not those of the whole sequence.
    """
    if torch.compiler.is_compiling() or positions is None or positions.ndim != 2 or not isinstance(cache, Cache):
        return None
    if cache.get_seq_length() != positions.shape[1] - 1:
        return None
    return document_starts(positions, attention_mask, 0) is not None
