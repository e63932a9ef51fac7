"""Caches of mixers after long contexts, for timing one decoding step."""

import copy
from collections.abc import Callable

import torch
from mixer_work import HEAD_SIZE, HEADS, WIDTH, LoneMixer
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

PIECE = 4096
"""Tokens of a prefill's calls."""


def prefill(lone: LoneMixer, contexts: list[int]) -> dict[int, Cache]:
    """Returns the caches after a number of tokens of one long row."""
    cache, found, past = Cache(layers=[LinearAttentionLayer()]), {}, 0
    for context in contexts:
        while past < context:
            tokens = min(PIECE, context - past)
            lone.bind(torch.randn(1, tokens, WIDTH), cache, past)()
            past += tokens
        found[context] = copy.deepcopy(cache)
    return found


def fill(contexts: list[int]) -> dict[int, Cache]:
    """Returns caches of attention with a number of random keys and values."""
    found = {}
    for context in contexts:
        found[context] = Cache(layers=[DynamicLayer()])
        found[context].update(*(torch.randn(1, HEADS, context, HEAD_SIZE) for _ in range(2)), 0)
    return found


def step_back(call: Callable[[], object], cache: Cache) -> None:
    """Runs a decoding step and removes its token from the cache."""
    call()
    cache.crop(-1)


def cache_bytes(cache: Cache) -> int:
    """Returns the bytes of all tensors of a cache."""
    layer = cache.layers[0]
    if isinstance(layer, DynamicLayer):
        kept = [layer.keys, layer.values]
    else:
        assert isinstance(layer, LinearAttentionLayer)
        kept = [*layer.recurrent_states.values(), *layer.conv_states.values()]
    return sum(tensor.nbytes for tensor in kept if tensor is not None)
