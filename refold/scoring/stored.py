"""A teacher's next-token distribution as it is kept on disk: the likeliest tokens, and one bucket for all others."""

from typing import NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor


class StoredPredictions(NamedTuple):
    """Top-k distribution of each position.

    Attributes:
        ids: the k likeliest tokens.
        log_probabilities: theirs; the rest of the probability lies in the bucket of all other tokens.
    """

    ids: Int64[Tensor, "*M k"]
    log_probabilities: Float[Tensor, "*M k"]
