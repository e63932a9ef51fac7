"""Counts of a source's tokens in a text, and the tokens of its chat template."""

from pathlib import Path

import numpy as np
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from refold.checkpoint.locate import Source
from refold.data.chat_template import TemplateFault, apply_chat_template
from refold.data.corpus import MOST_BYTES_PER_TOKEN, Data, open_text
from refold.data.encoder import Encoding, TextEncoder
from refold.data.mixture import Interleave, MixedSource
from refold.data.readers import DataSource
from refold.data.spool import SPOOL_BYTES
from refold.data.tokens import require_known_tokens
from refold.modeling.load import load_tokenizer
from refold.sources.source_model import SourceModel, read_source_model

TokenCounts = Int64[np.ndarray, " num_tokens"]

_TALKS = (
    [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e")],
    [("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e")],
)
"""Conversations that a chat template writes; templates without a system role refuse the first."""


def count_tokens(
    source: str | Path | Source | SourceModel, data: Data, tokens: int | None = None, seed: int = 0
) -> TokenCounts:
    """Counts how often a text has each token of a source. The text is streamed, and no model is loaded.

    Args:
        source: Folder, hub id, or a source that is read already.
        data: Text, see `refold.data.corpus`. Weights of a mixture divide `tokens`.
        tokens: Most tokens to count, documents in random order; None: the whole text.
        seed: Seed of the order of documents.

    Returns:
        Occurrences of each id, `[vocab_size]`.

    Raises:
        SourceError: The source has no tokenizer.
        DataError: The text is missing or broken, or has a token that the embedding has no row for.
    """
    model = source if isinstance(source, SourceModel) else read_source_model(source)
    limit = SPOOL_BYTES if tokens is None else MOST_BYTES_PER_TOKEN * tokens + 2**20
    text = data if isinstance(data, DataSource) else open_text(data, limit=limit)
    tokenizer, size = load_tokenizer(model.source), model.arch.vocab_size
    if tokens is None or not isinstance(text, MixedSource) or text.weights is None:
        return _count(text, tokenizer, size, tokens, seed)
    shares = Interleave(text.weights).shares
    counted = [
        _count(part, tokenizer, size, max(1, int(tokens * share)), seed)
        for part, share in zip(text.parts, shares, strict=True)
    ]
    return np.sum(counted, axis=0)


def _count(
    text: DataSource, tokenizer: PreTrainedTokenizerBase, size: int, tokens: int | None, seed: int
) -> np.ndarray:
    total = np.zeros(size, dtype=np.int64)
    documents = text.documents(None if tokens is None else seed)
    for document in Encoding(documents, TextEncoder(tokenizer), budget=tokens):
        require_known_tokens(f"vocabulary: {text.name}", document.ids, size)
        total += np.bincount(document.ids, minlength=size)
    return total


def template_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids of all tokens in conversations that a tokenizer's chat template writes; none without one.

    Conversations have the roles system, user and assistant, and end with and without the prompt for a reply.
    """
    if not getattr(tokenizer, "chat_template", None):
        return set()
    found: set[int] = set()
    for talk in _TALKS:
        messages = [{"role": role, "content": content} for role, content in talk]
        for asks in (False, True):
            try:
                text = apply_chat_template(tokenizer, messages, tokenize=False, add_generation_prompt=asks)
            except TemplateFault:
                continue
            found |= set(tokenizer(str(text), add_special_tokens=False, verbose=False)["input_ids"])
    return found
