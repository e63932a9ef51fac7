"""Associative recall: pairs of a key and a value, then all keys again, each followed by its value."""

import numpy as np

from refold.scorecard.recall.item import RecallCell, RecallItem, draws_of
from refold.scorecard.recall.word_pool import WordPool

KIND = "associative"


def make_associative(pool: WordPool, length: int, count: int, seed: int) -> RecallCell | str:
    """Makes items of associative recall (multi-query, arXiv 2312.04927).

    Keys and values are single tokens drawn at random, the keys of an item all different. About a quarter of the length
    is the number of pairs: a longer context holds more of them. The answers are the values behind the repeated keys.

    Args:
        pool: Words; one half of them are keys, the other half values.
        length: Tokens of an item.
        count: Number of items.
        seed: Seed of the scorecard.

    Returns:
        The items, or the reason why there are none.
    """
    numbers = draws_of(seed, KIND, length)
    pairs, half = (length - len(pool.opening)) // 4, len(pool.words) // 2
    if pairs > half:
        return f"{KIND}, {length} tokens: {pairs} keys are required (the vocabulary has {half} words for them)"
    items = tuple(_make(pool, pairs, length, numbers) for _ in range(count))
    return RecallCell(KIND, length, None, items, 1 / half)


def _make(pool: WordPool, pairs: int, length: int, numbers: np.random.Generator) -> RecallItem:
    words, half = numbers.permutation(pool.words), len(pool.words) // 2
    keys, values = words[:pairs], numbers.choice(words[half : 2 * half], pairs)
    order = numbers.permutation(pairs)
    told, asked = (np.stack(each, 1).reshape(-1) for each in ((keys, values), (keys[order], values[order])))
    # Up to three words in front make every item exactly as long.
    filler = numbers.choice(pool.words, length - len(pool.opening) - 4 * pairs)
    tokens = np.concatenate((pool.opening, filler, told, asked)).astype(np.int64)
    is_answer, is_mention = np.zeros((2, length), dtype=bool)
    is_answer[length - 2 * pairs + 1 :: 2] = True
    is_mention[length - 4 * pairs + 1 : length - 2 * pairs : 2] = True
    return RecallItem(tokens, is_answer, is_mention)
