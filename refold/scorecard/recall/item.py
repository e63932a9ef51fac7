"""An item of recall: tokens of which some are answers."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64


@dataclass(frozen=True)
class RecallItem:
    """A sequence in which the model has to recall some tokens.

    Attributes:
        tokens: Token ids; a start token comes first if the tokenizer has one.
        is_answer: Whether a token has to be recalled from the tokens before it; False at the first token.
        is_mention: Whether a token is the earlier mention of an answer, after the same token as there; as many as
            answers. None: the answers are not in the text before them.
    """

    tokens: Int64[np.ndarray, "_"]
    is_answer: Bool[np.ndarray, "_"]
    is_mention: Bool[np.ndarray, "_"] | None = None


@dataclass(frozen=True)
class RecallCell:
    """Items of one kind, length and depth.

    Attributes:
        kind: Kind of recall.
        length: Tokens of each item.
        depth: Place of the needle, 0 the start and 1 the end; None without a needle.
        items: The items, all of one length.
        chance: Accuracy of an answer that is drawn from the words it may be; None for free text.
    """

    kind: str
    length: int
    depth: float | None
    items: tuple[RecallItem, ...]
    chance: float | None


def draws_of(seed: int, *place: int | str) -> np.random.Generator:
    """Returns the random numbers of one cell, which do not depend on the other cells that are made.

    Args:
        seed: Seed of the scorecard.
        *place: Kind, length and depth.
    """
    words = [int.from_bytes(str(part).encode(), "little") % 2**63 for part in place]
    return np.random.default_rng([seed, *words])
