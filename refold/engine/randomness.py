"""Random numbers by counter: a function of seed, choice, place and stream, whatever else runs beside them."""

from enum import IntEnum

import numpy as np
from jaxtyping import Float64, UInt64

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: the increment of SplitMix64."""
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_UNIT = 2.0**-53


class RandomStream(IntEnum):
    """Uses of random numbers at one place; their numbers are independent."""

    PLAIN = 0
    """The draw of a new token."""
    DRAFT = 1
    """The draw of a drafted token."""
    ACCEPT = 2
    """The decision about a drafted token."""
    CORRECT = 3
    """The draw of the token that replaces a rejected one."""


def mix(numbers: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Applies the output function of SplitMix64 (Steele et al., OOPSLA 2014, figure 14), modulo 2^64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(_FIRST)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(_SECOND)
    return numbers ^ (numbers >> np.uint64(31))


def absorb(state: UInt64[np.ndarray, "*shape"], number: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Returns the state after one more number: a hash of all numbers in their order."""
    return mix(state ^ mix((number + np.uint64(1)) * np.uint64(_GOLDEN)))


def key(seed: int, choice: int) -> np.uint64:
    """Returns the key of one choice of a request."""
    start = absorb(np.array([_GOLDEN], dtype=np.uint64), np.array([seed], dtype=np.uint64))
    return absorb(start, np.array([choice], dtype=np.uint64))[0]


def uniforms(
    keys: UInt64[np.ndarray, " R"], places: UInt64[np.ndarray, " R"], stream: int
) -> Float64[np.ndarray, " R"]:
    """Returns numbers in [0, 1), of 53 bits.

    Args:
        keys: `key` of each row.
        places: Number of new tokens before each row's token.
        stream: The use of the number.
    """
    bits = absorb(absorb(keys, places), np.full_like(places, stream))
    return (bits >> np.uint64(11)).astype(np.float64) * _UNIT
