"""transformers' caches as a store: layer i of the cache is the memory of depth i."""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from refold.errors import RefoldError
from refold.nn.mixers.key_values import KeyValue
from refold.nn.mixers.store import Appended, Memory, Store
from refold.ops.documents import number_documents

_MADE: "WeakKeyDictionary[Any, dict[int, KeyValue]]" = WeakKeyDictionary()
"""Cache to the keys and values that depths made once for it. No layer holds them, because they are no tokens."""


class StateView(nn.Module):
    """One depth's place in the cache; no weights."""

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def extra_repr(self) -> str:
        return f"layer_idx={self.layer_idx}"


class CacheStore(Store):
    """A cache as the store of a forward pass. The cache object itself gets no attribute and no method of ours.

    Args:
        cache: transformers' `Cache`, indexed by depth, or the paged cache of its continuous batching.
    """

    def __init__(self, cache: Any):
        self.cache = cache

    def memory(self, depth: int, adapters: int = 0) -> "CacheMemory":
        assert not adapters, "a cache belongs to the model's own adapters"
        return CacheMemory(self.cache, depth)

    @property
    def num_made_bytes(self) -> int:
        """Bytes of keys and values made once for this cache, those of prefixes."""
        return sum(states.nbytes for pair in _MADE.get(self.cache, {}).values() for states in pair)


class CacheMemory(Memory):
    """One layer of a cache.

    Args:
        cache: Of the model.
        layer_idx: Which depth.
    """

    def __init__(self, cache: Any, layer_idx: int):
        self._cache, self._layer_idx = cache, layer_idx

    def append(self, key: Tensor, value: Tensor, extra: Mapping[str, Any]) -> Appended:
        if isinstance(self._cache, Cache):
            keys, values = self._cache.update(key, value, self._layer_idx)
            return Appended(keys, values, extra)
        # A paged cache writes the layer's own arguments of the back-end into the dictionary it is given.
        arguments = dict(extra)
        keys, values = self._cache.update(key, value, self._layer_idx, kwargs=arguments)
        return Appended(keys, values, arguments)

    def state(self) -> Tensor | None:
        layer = self._layer()
        return layer.recurrent_states[0] if layer.has_previous_state[0] else None

    def keep_state(self, state: Tensor) -> None:
        layer = self._layer()
        if not layer.has_previous_state[0]:
            # Last inputs mark a layer as used; a mixer that keeps no inputs stores one column of zeros.
            layer.update_conv_state(state.new_zeros(len(state), 1, 1))
        layer.update_recurrent_state(state)

    def exchange(self, inputs: Tensor, width: int, resets: Tensor | None) -> Tensor | None:
        layer = self._layer()
        before = layer.conv_states[0] if layer.has_previous_state[0] else None
        columns = inputs.transpose(1, 2)
        if not layer.is_conv_states_initialized[0]:
            # The layer takes its sizes from its first inputs, which may be shorter than the width.
            layer.lazy_initialization(conv_states=columns, conv_kernel_size=width)
        earlier = None if before is None else before.transpose(1, 2).clone()
        if resets is not None:
            numbers = number_documents(resets, resets.shape[0], resets.shape[1], resets.device)
            columns = columns * (numbers == numbers[:, -1:]).unsqueeze(1)
            if before is not None:
                before.copy_(before * (numbers[:, -1] == 0)[:, None, None])
        layer.update_conv_state(columns)
        return earlier

    def once(self, make: Callable[[], KeyValue]) -> KeyValue:
        # Where gradients are wanted, or code is being compiled, they are made anew.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        made = _MADE.setdefault(self._cache, {})
        if self._layer_idx not in made:
            made[self._layer_idx] = make()
        return made[self._layer_idx]

    def _layer(self) -> LinearAttentionLayer:
        layers = getattr(self._cache, "layers", ())
        layer = layers[self._layer_idx] if self._layer_idx < len(layers) else None
        if not isinstance(layer, LinearAttentionLayer):
            raise RefoldError(
                f"cache: a cache made for this model's config is required (got {type(layer).__name__} at "
                f"depth {self._layer_idx}); use DynamicCache(config=model.config)"
            )
        return layer


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
