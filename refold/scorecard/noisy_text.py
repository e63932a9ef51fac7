"""Noise in texts: swapped and dropped letters, random case, replaced words."""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

NoiseRule = Callable[[str, Float[np.ndarray, "_"], float, Callable[[], str]], str]
"""Function of a text, a random number for each of its characters, a share, and a draw of a word."""
_WORD = re.compile(r"\w+")


def make_noise(kind: str, text: str, share: float, seed: Sequence[int], words: Sequence[str]) -> str:
    """Returns a text with noise.

    The random numbers depend on the seed and not on the share: the changes of a small share are among those of a
    larger one, except for neighbouring swaps.

    Args:
        kind: One of `NOISES`.
        text: The text.
        share: Share of letters or words that change.
        seed: Seed of the changes.
        words: Words that replace others, drawn evenly.
    """
    numbers = np.random.default_rng(list(seed))
    draws = numbers.random(len(text))
    return NOISES[kind](text, draws, share, lambda: words[int(numbers.integers(len(words)))])


def split_words(text: str) -> list[str]:
    """Returns the words of a text."""
    return _WORD.findall(text)


def _swap(text: str, draws: np.ndarray, share: float, word: Callable[[], str]) -> str:
    letters = list(text)
    place = 0
    while place + 1 < len(letters):
        if draws[place] < share and letters[place].isalpha() and letters[place + 1].isalpha():
            letters[place : place + 2] = letters[place + 1], letters[place]
            place += 1  # a letter is swapped once
        place += 1
    return "".join(letters)


def _drop(text: str, draws: np.ndarray, share: float, word: Callable[[], str]) -> str:
    return "".join(letter for letter, draw in zip(text, draws, strict=True) if draw >= share or not letter.isalpha())


def _change_case(text: str, draws: np.ndarray, share: float, word: Callable[[], str]) -> str:
    return "".join(letter.swapcase() if draw < share else letter for letter, draw in zip(text, draws, strict=True))


def _replace(text: str, draws: np.ndarray, share: float, word: Callable[[], str]) -> str:
    def replace(found: re.Match[str]) -> str:
        # Drawn for every word, so that a word is replaced by the same one whatever the share.
        other = word()
        return other if draws[found.start()] < share else found.group()

    return _WORD.sub(replace, text)


NOISES: Mapping[str, NoiseRule] = {
    "swapped letters": _swap,
    "dropped letters": _drop,
    "random case": _change_case,
    "replaced words": _replace,
}
"""Kinds of noise: a letter changes places with the next one, is dropped, or changes its case; or a word gives way to a
word of any of the openings."""
