"""The inputs of a forward pass besides the residual stream: those of all depths, and those of one."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refold.nn.mixers.key_values import KeyHeads, KeyValue
from refold.nn.mixers.store import NOTHING_KEPT, Memory
from refold.nn.rotary import Rotation


@dataclass(frozen=True)
class Batch:
    """The inputs that all depths of one forward pass share.

    Attributes:
        rotations: Cosines and sines of each rope of the stack.
        masks: Window (None: the whole context) to the attention mask, in the form the attention back-end takes; None:
            plainly causal.
        document_starts: `[B, T]`, for each token the slot (counted from the first token of the cache) where its
            document begins; None where each row is one document. No mixer may look, or carry state, across it.
        resets: `[B, T]`, true where a document, or after left padding the row, begins: recurrent states are emptied
            there; None: nowhere in this call.
        extra: Further arguments of the attention back-end.
        order: `[B, T]`, an order of the tokens with padding first, in which recurrent mixers take them in and `resets`
            are given; None: as they are.
    """

    rotations: tuple[Rotation, ...] = ()
    masks: Mapping[int | None, Any] = field(default_factory=dict)
    document_starts: Tensor | None = None
    resets: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    order: Tensor | None = None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Batch":
        """Returns it on a device; accelerate moves the arguments of modules that it has placed by this method."""
        move = partial(_move, device=device, non_blocking=non_blocking)
        return Batch(*(move(getattr(self, each.name)) for each in fields(self)))


def _move(value: Any, device: Any, non_blocking: bool) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, tuple):
        return tuple(_move(each, device, non_blocking) for each in value)
    if isinstance(value, Mapping):
        return {name: _move(each, device, non_blocking) for name, each in value.items()}
    return value


@dataclass(frozen=True)
class SharedKeys:
    """Keys and values of earlier depths that one depth reads.

    Attributes:
        heads: Which heads the depth makes and which it reads.
        read: Of each source in turn.
    """

    heads: KeyHeads
    read: tuple[KeyValue, ...] = ()


class DepthInputs(NamedTuple):
    """The inputs of the mixer of one depth besides the residual stream.

    Attributes:
        rotation: Of the depth's rope; None without rotary embedding.
        attention_mask: Of the depth's window, as in `Batch`.
        document_starts: As in `Batch`.
        resets: As in `Batch`.
        memory: Keys and values, or the recurrent state, of earlier calls.
        extra: As in `Batch`.
        shared: Keys and values of earlier depths; None: the depth makes all of its own and no later depth reads them.
        prefix: `[P, D]`, to which every token attends besides tokens; None: nothing.
        order: As in `Batch`.
    """

    rotation: Rotation | None = None
    attention_mask: Any = None
    document_starts: Tensor | None = None
    resets: Tensor | None = None
    memory: Memory = NOTHING_KEPT
    extra: Mapping[str, Any] = MappingProxyType({})
    shared: SharedKeys | None = None
    prefix: Tensor | None = None
    order: Tensor | None = None
