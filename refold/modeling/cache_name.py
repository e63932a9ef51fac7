"""transformers' name of a cache in arguments and outputs: `cache` from 5.24 on, `past_key_values` before."""

from inspect import signature
from typing import Any

from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

AnyCache = Cache | Any
"""A `Cache`, or the paged cache of continuous batching, which is of another class."""
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(name for name in CACHE_NAMES if name in signature(create_causal_mask).parameters)


def one_cache(cache: AnyCache | None, past_key_values: AnyCache | None) -> AnyCache | None:
    """Returns the cache that was given under either name, with any version of transformers.

    Raises:
        ValueError: A cache was given under each name.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache: one of `cache` and `past_key_values` is required (got both); they are the same")
    return past_key_values if cache is None else cache
