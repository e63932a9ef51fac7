"""What a depth hands to whatever mixer it runs."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from refold.nn.mixers.key_values import Exchange
from refold.nn.rotary import Rotation


@dataclass
class MixerContext:
    """The part of a forward pass that mixers of one window and rope share.

    Attributes:
        rotation: Cosines and sines, or None without rotary embedding.
        attention_mask: In the form the attention back-end asks for; None: plainly causal.
        document_starts: `[B, T]`, for each token the slot (counted from the first token of the cache) where its
            document begins; None where each row is one document. No mixer may look, or carry state, across it.
        resets: `[B, T]`, true where a document, or after left padding the row, begins: recurrent states are emptied
            there; None: nowhere in this call.
        order: `[B, T]`, an order of the tokens with padding first, in which recurrent mixers take them in and `resets`
            are given; None: as they are.
        cache: Cache indexed by depth, or None.
        extra: Further arguments for the attention back-end.
        exchange: Keys and values of earlier depths, and a place for the depth's own; None: all are its own.
        prefix: `[P, D]`, what every token of the depth attends to besides tokens; None: nothing.
    """

    rotation: Rotation | None
    attention_mask: Any
    document_starts: Tensor | None
    resets: Tensor | None
    cache: Cache | None
    extra: dict[str, Any] = field(default_factory=dict)
    exchange: Exchange | None = None
    prefix: Tensor | None = None
    order: Tensor | None = None
