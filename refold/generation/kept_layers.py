"""Tensors of a cache's layers, copied out of one cache and into others."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from refold.errors import RefoldError
from refold.modeling.recurrent_cache import new_cache

_EMPTY = ("moe", "mlp")
"""Layer types in configs whose layers cache nothing, whichever class transformers uses for them."""
_KNOWN = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


class KeptLayers(NamedTuple):
    """Content of a cache for one sequence.

    Attributes:
        tokens_seen: Number of tokens that the cache has read.
        layers: Tensors of each layer by name: `keys` and `values` `[1, heads, slots, size]`, `recurrent` and `inputs`
            (a state, and the last inputs before it). A layer can have both kinds, or none.
    """

    tokens_seen: int
    layers: tuple[dict[str, Tensor], ...]


def kept_names(config: PreTrainedConfig) -> list[set[str]]:
    """Returns the names of the tensors that each layer of a model's cache holds after the first token.

    Raises:
        RefoldError: A layer is of a kind that cannot be copied.
    """
    found: list[set[str]] = []
    types = getattr(config, "layer_types", None) or ()
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if index < len(types) and types[index] in _EMPTY:
            found.append(set())
            continue
        if type(layer) not in _KNOWN:
            raise RefoldError(
                f"state: a model whose layers cache keys and values or a recurrent state is required (got a "
                f"{type(layer).__name__}); give the whole prompt each time"
            )
        has_state, has_keys = isinstance(layer, LinearAttentionLayer), isinstance(layer, DynamicLayer)
        found.append(({"recurrent", "inputs"} if has_state else set()) | ({"keys", "values"} if has_keys else set()))
    return found


def take(cache: Cache, tokens_seen: int) -> KeptLayers:
    """Copies the content of a cache of one sequence that has read `tokens_seen` tokens."""
    return KeptLayers(
        tokens_seen, tuple({name: tensor.clone() for name, tensor in _held(layer).items()} for layer in cache.layers)
    )


def join(config: PreTrainedConfig, rows: Sequence[KeptLayers]) -> DynamicCache:
    """Makes a cache of several sequences.

    The result equals the cache of a left-padded batch. The caller must pass the matching attention mask. States need no
    padding.

    Args:
        config: The model's config.
        rows: Content of the cache for each sequence.
    """
    cache = new_cache(config)
    tokens_seen = max(row.tokens_seen for row in rows)
    for index, layer in enumerate(cache.layers):
        parts = {name: [row.layers[index][name] for row in rows] for name in rows[0].layers[index]}
        if isinstance(layer, LinearAttentionLayer) and "recurrent" in parts:
            inputs, state = torch.cat(parts["inputs"]), torch.cat(parts["recurrent"])
            layer.lazy_initialization(conv_states=inputs, recurrent_states=state)
            layer.update_conv_state(inputs)
            layer.update_recurrent_state(state)
        if isinstance(layer, DynamicLayer) and "keys" in parts:
            layer.update(_pad_left(parts["keys"]), _pad_left(parts["values"]))
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = tokens_seen
    return cache


def _held(layer: object) -> dict[str, Tensor]:
    found: dict[str, Tensor | None] = {}
    if isinstance(layer, LinearAttentionLayer):
        found |= {"recurrent": layer.recurrent_states[0], "inputs": layer.conv_states[0]}
    if isinstance(layer, DynamicLayer):
        found |= {"keys": layer.keys, "values": layer.values}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _pad_left(rows: list[Tensor]) -> Tensor:
    slots = max(row.shape[2] for row in rows)
    return torch.cat([nn.functional.pad(row, (0, 0, slots - row.shape[2], 0)) for row in rows])
