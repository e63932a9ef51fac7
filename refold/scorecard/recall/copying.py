"""Copying: a random sequence of words, and the same sequence again."""

import numpy as np

from refold.scorecard.recall.item import RecallCell, RecallItem, draws_of
from refold.scorecard.recall.word_pool import WordPool

KIND = "copying"


def make_copying(pool: WordPool, length: int, count: int, seed: int) -> RecallCell:
    """Makes items of copying (as for state-space models in arXiv 2402.01032).

    The answers are the words of the second copy but its first, which nothing announces. Words are all different where
    the vocabulary has enough of them.

    Args:
        pool: Words.
        length: Tokens of an item.
        count: Number of items.
        seed: Seed of the scorecard.
    """
    numbers = draws_of(seed, KIND, length)
    items = tuple(_make(pool, length, numbers) for _ in range(count))
    return RecallCell(KIND, length, None, items, 1 / len(pool.words))


def _make(pool: WordPool, length: int, numbers: np.random.Generator) -> RecallItem:
    room = length - len(pool.opening)
    half = room // 2
    words = numbers.choice(pool.words, half, replace=half > len(pool.words))
    # One word in front makes every item exactly as long.
    filler = numbers.choice(pool.words, room - 2 * half)
    tokens = np.concatenate((pool.opening, filler, words, words)).astype(np.int64)
    is_answer, is_mention = np.zeros((2, length), dtype=bool)
    is_answer[length - half + 1 :] = True
    is_mention[length - 2 * half + 1 : length - half] = True
    return RecallItem(tokens, is_answer, is_mention)
