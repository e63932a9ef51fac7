"""The words that items of recall are made of: single tokens of a vocabulary that any text may hold."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from refold.data.encoder import document_start_token

MOST_WORDS = 1024
"""Words of a pool. Tokens with low ids come first: they are frequent in byte-pair vocabularies, so models know them."""
FEWEST_WORDS = 64
"""Words below which a pool takes tokens of any kind."""
FIRST_PLAIN = 3
"""Number of first token ids that are often special, where no tokenizer says so."""
# The marks of a space before a word: of byte-level and of SentencePiece vocabularies.
_WORD = re.compile(r"[Ġ▁][a-z]{3,}")


@dataclass(frozen=True)
class WordPool:
    """Words of one tokenizer.

    Attributes:
        words: Ids of single tokens, in order of their ids.
        start: Id of the token before each text; None if the tokenizer has none.
    """

    words: Int64[np.ndarray, "_"]
    start: int | None

    @property
    def opening(self) -> list[int]:
        """The start token, or nothing."""
        return [] if self.start is None else [self.start]


def find_words(tokenizer: PreTrainedTokenizerBase | None, num_embeddings: int) -> WordPool:
    """Returns the words of a vocabulary: whole lower-case words of at least three letters, if there are enough.

    A vocabulary with fewer than 64 of them gives tokens of any kind except special ones, and a model without a
    tokenizer gives ids from 3 on.

    Args:
        tokenizer: The tokenizer; None: there is none.
        num_embeddings: Rows of the model's embedding.
    """
    if tokenizer is None:
        return WordPool(np.arange(min(FIRST_PLAIN, num_embeddings - 1), num_embeddings)[:MOST_WORDS], None)
    size = min(len(tokenizer), num_embeddings)
    # Added tokens are special, or chat marks.
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    plain = [token for token in range(size) if token not in special]
    names: Sequence[str | None] = tokenizer.convert_ids_to_tokens(plain)
    words = [token for token, name in zip(plain, names, strict=True) if name is not None and _WORD.fullmatch(name)]
    chosen = words if len(words) >= FEWEST_WORDS else plain
    return WordPool(np.array(chosen[:MOST_WORDS], dtype=np.int64), document_start_token(tokenizer))
