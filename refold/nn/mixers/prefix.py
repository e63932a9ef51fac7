"""A depth's prefix: keys and values that every token attends to, wherever it stands."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.errors import RefoldError
from refold.nn.mixers.context import MixerContext
from refold.nn.mixers.key_values import KeyValue

_KEPT = "refold_prefixes"


def once(context: MixerContext, layer_idx: int, make: Callable[[Tensor], KeyValue]) -> KeyValue:
    """Returns a prefix's keys and values, which are made once for each cache: they depend on nothing but weights.

    Where gradients are wanted, or code is being compiled, they are made anew.

    Args:
        context: Of the depth, with its prefix.
        layer_idx: Which depth.
        make: From the prefix to its keys and values.
    """
    assert context.prefix is not None
    if context.cache is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return make(context.prefix)
    # Not in a cache layer: these are no tokens, and sequences come and go without them.
    kept = vars(context.cache).setdefault(_KEPT, {})
    if layer_idx not in kept:
        kept[layer_idx] = make(context.prefix)
    return kept[layer_idx]


def put_before(
    prefix: KeyValue,
    query: Float[Tensor, "B H T K"],
    key: Float[Tensor, "B G S K"],
    value: Float[Tensor, "B G S K"],
    mask: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Puts a prefix before the keys and values of tokens, and makes a mask by which all tokens see all of it.

    Args:
        prefix: Keys and values `[1, G, P, K]`.
        query: Only its length and device matter.
        key: Of tokens.
        value: Of tokens.
        mask: `[B, 1, T, S]`, true or zero where a token is seen; None: causal, the last T of S tokens look back.
        window: How many latest tokens are seen without a mask; None: all.

    Raises:
        RefoldError: The mask is of another form.
    """
    tokens, num_keys, length = query.shape[2], key.shape[2], prefix[0].shape[2]
    if mask is None:
        place = torch.arange(num_keys, device=key.device)
        own = place[num_keys - tokens :, None]
        seen = place <= own
        mask = (seen if window is None else seen & (place > own - window))[None, None]
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise RefoldError(
            f"attn_implementation: sdpa or eager attention is required by prefixes (got a mask of type "
            f"{type(mask).__name__}); load the model with attn_implementation='sdpa'"
        )
    mask = nn.functional.pad(mask[..., :num_keys], (length, 0), value=mask.dtype == torch.bool)
    batch = len(key)
    key, value = (
        torch.cat((own.to(states.dtype).expand(batch, -1, -1, -1), states), dim=2)
        for own, states in zip(prefix, (key, value), strict=True)
    )
    return key, value, mask
