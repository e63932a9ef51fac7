"""A depth's prefix: keys and values that every token attends to, wherever it stands."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.errors import RefoldError
from refold.nn.mixers.key_values import KeyValue


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
    batch = key.shape[0]
    key, value = (
        torch.cat((own.to(states.dtype).expand(batch, -1, -1, -1), states), dim=2)
        for own, states in zip(prefix, (key, value), strict=True)
    )
    return key, value, mask
