"""Passkey: words hidden at some depth of a long text, which a question at the end asks for."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from refold.scorecard.recall.item import RecallCell, RecallItem, draws_of
from refold.scorecard.recall.word_pool import WordPool

KIND = "passkey"
NUM_WORDS = 3
"""Words of a passkey."""
TASK = "There is important information hidden in the text below. Find it and remember it."
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = (" The pass key is", ". Remember it.", " is the pass key.")
QUESTION = " What is the pass key? The pass key is"


@dataclass(frozen=True)
class PasskeyText:
    """The fixed texts of passkey items as tokens of one tokenizer.

    Attributes:
        task: The first sentences.
        filler: Sentences that are repeated up to the length.
        needle: The three pieces around the two mentions of the passkey.
        question: The last sentences, up to the passkey.
    """

    task: list[int]
    filler: list[int]
    needle: tuple[list[int], ...]
    question: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "PasskeyText":
        """Encodes the texts. Pieces are encoded one by one, so that a passkey has the same tokens at every place."""

        encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        return cls(encode(TASK), encode(FILLER), tuple(map(encode, NEEDLE)), encode(QUESTION))


def make_passkey(
    pool: WordPool, text: PasskeyText, length: int, depth: float, count: int, seed: int
) -> RecallCell | str:
    """Makes items of passkey retrieval (arXiv 2305.16300), with random words in place of the number.

    A number has as many tokens as the tokenizer likes; three words have three in every vocabulary.

    Args:
        pool: Words.
        text: The fixed texts.
        length: Tokens of an item, its answer included.
        depth: Place of the needle among the filler sentences: 0 before all of them, 1 behind.
        count: Number of items.
        seed: Seed of the scorecard.

    Returns:
        The items, or the reason why there are none.
    """
    numbers = draws_of(seed, KIND, length, f"{depth:g}")
    keys = [numbers.choice(pool.words, NUM_WORDS, replace=False).tolist() for _ in range(count)]
    made = [_make(pool, text, length, depth, key) for key in keys]
    items = tuple(item for item in made if item is not None)
    if not items:
        return f"{KIND}, {length} tokens: a longer context is required for the question and the passkey"
    return RecallCell(KIND, length, depth, items, 1 / len(pool.words))


def _make(pool: WordPool, text: PasskeyText, length: int, depth: float, key: list[int]) -> RecallItem | None:
    first, middle, last = text.needle
    needle = [*first, *key, *middle, *key, *last]
    room = length - sum(map(len, (pool.opening, text.task, needle, text.question, key)))
    if room < 0:
        return None
    filler = (text.filler * (room // len(text.filler) + 1))[:room]
    place = round(depth * room)
    tokens = [*pool.opening, *text.task, *filler[:place], *needle, *filler[place:], *text.question, *key]
    is_answer, is_mention = np.zeros((2, length), dtype=bool)
    is_answer[-len(key) :] = True
    mention = len(pool.opening) + len(text.task) + place + len(first)
    is_mention[mention : mention + len(key)] = True
    return RecallItem(np.array(tokens, dtype=np.int64), is_answer, is_mention)
