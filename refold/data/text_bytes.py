"""How many bytes of text the scored tokens of each document stand for."""

import re

import numpy as np
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from refold.data.tokens import TokenisedDocuments

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def scored_bytes(
    tokenised: TokenisedDocuments, tokenizer: PreTrainedTokenizerBase
) -> Int64[np.ndarray, "num_documents"]:
    """Counts the UTF-8 bytes whose tokens are scored.

    With a start token before each document every token of the text is scored, and all bytes count. Without one nothing
    predicts the first token: it is not scored, so its bytes do not count either.
    """
    sizes = np.diff(tokenised.byte_offsets)
    if tokenised.document_start is not None:
        return sizes
    firsts = tokenised.tokens[tokenised.offsets[:-1]]
    sizes = np.maximum(sizes - np.array([_token_bytes(tokenizer, int(token)) for token in firsts]), 0)
    return np.where(np.diff(tokenised.offsets) > 1, sizes, 0)


def _token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> int:
    name = str(tokenizer.convert_ids_to_tokens(token))
    if _BYTE_TOKEN.fullmatch(name):
        return 1
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    # A piece of a character: byte-level vocabularies spell each byte as one character.
    return len(name) if _REPLACEMENT in text else len(text.encode())
