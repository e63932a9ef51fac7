"""The cache of stacks with recurrent mixers: it refuses to be cropped before anything in it changes."""

from typing import Any

from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from refold.errors import RefoldError
from refold.modeling.cache_name import CACHE_NAME
from refold.modeling.configuration import COUNTING, RECURRENT, RefoldConfig


class RecurrentCache(DynamicCache):
    """transformers' dynamic cache, for configs some of whose depths keep a recurrent state.

    Its layers would refuse too, but only after those before them were cropped.
    """

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens.

        Args:
            tokens_to_remove: Minus their number; 0 removes nothing.

        Raises:
            RefoldError: A recurrent state was kept; nothing has changed.
        """
        keeps_states = any(_keeps_state(layer) for layer in self.layers)
        if keeps_states and tokens_to_remove:
            raise RefoldError(
                "crop: a cache of keys and values alone is required (got recurrent states, which cannot be taken "
                "back); read the shorter text anew, or go on from a copy.deepcopy of the cache from before"
            )
        # Layers that record no past have nothing to drop, and those with states would refuse.
        if not keeps_states or all(getattr(layer, "record_past", True) for layer in self.layers):
            super().crop(tokens_to_remove)


def new_cache(config: Any) -> DynamicCache:
    """Returns an empty cache for a model, folded or not."""
    return RecurrentCache(config=config) if _has_states(config) else DynamicCache(config=config)


def prepare_generation_cache(arguments: dict[str, Any], config: RefoldConfig) -> None:
    """Replaces the dynamic cache that `generate` has just made, where the model keeps recurrent states.

    Args:
        arguments: Of the model's forward passes; the cache in them is empty.
        config: Of the model.
    """
    made = arguments.get(CACHE_NAME)
    if type(made) is DynamicCache and not made.offloading and _has_states(config):
        arguments[CACHE_NAME] = RecurrentCache(config=config)


def _has_states(config: Any) -> bool:
    return isinstance(config, RefoldConfig) and bool({RECURRENT, COUNTING} & set(config.layer_types or ()))


def _keeps_state(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionLayer) and any(layer.has_previous_state.values())
