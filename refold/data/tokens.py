"""Tokenised documents for evaluation, with the number of bytes of their text."""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from refold.checkpoint.atomic_file import flush
from refold.data.encoder import Encoding, TextEncoder, digest, document_start_token
from refold.data.readers import DataSource
from refold.errors import DataError

__all__ = ["TokenisedDocuments", "document_start_token", "require_known_tokens", "tokenise"]


@dataclass(frozen=True)
class TokenisedDocuments:
    """The tokens of several documents in one flat array.

    Attributes:
        tokens: `[num_tokens]`, uint16 for a vocabulary below 65,536, else uint32.
        offsets: Int64 `[num_documents + 1]`; document d, with its start token, is `tokens[offsets[d]:offsets[d + 1]]`.
        byte_offsets: Int64 `[num_documents + 1]`, cumulative UTF-8 bytes of the texts (0 for start tokens).
        document_start: Id of the token put before each document; None for a tokenizer without bos and eos.
        is_whole_source: Whether the data ended before the budget; the arrays are then one whole epoch.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    byte_offsets: np.ndarray
    document_start: int | None
    is_whole_source: bool

    @property
    def num_tokens(self) -> int:
        """Number of tokens, start tokens included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Number of documents, a cut last one included."""
        return len(self.offsets) - 1

    @property
    def num_bytes(self) -> int:
        """Number of UTF-8 bytes of all texts."""
        return int(self.byte_offsets[-1])

    def document(self, index: int) -> np.ndarray:
        """Returns the tokens of one document, its start token included."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def join_tokenised(parts: Sequence[TokenisedDocuments]) -> TokenisedDocuments:
    """Concatenates documents of one tokenizer."""

    def run_on(arrays: Sequence[np.ndarray]) -> np.ndarray:
        lengths = np.concatenate([np.diff(array) for array in arrays])
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])

    return TokenisedDocuments(
        tokens=np.concatenate([part.tokens for part in parts]),
        offsets=run_on([part.offsets for part in parts]),
        byte_offsets=run_on([part.byte_offsets for part in parts]),
        document_start=parts[0].document_start,
        is_whole_source=all(part.is_whole_source for part in parts),
    )


def require_known_tokens(where: str, tokens: np.ndarray | Sequence[int], vocab_size: int | None) -> None:
    """Checks that a model's embedding has a row for every token.

    Args:
        where: Name of the text or the data, for the message.
        tokens: Token ids.
        vocab_size: Rows of the embedding; None: no check.

    Raises:
        DataError: A token is not below `vocab_size`, because the tokenizer is longer than the embedding; or below 0.
    """
    listed = isinstance(tokens, Sequence)
    largest = int(max(tokens, default=0)) if listed else int(tokens.max(initial=0))
    smallest = int(min(tokens, default=0)) if listed else int(tokens.min(initial=0))
    if smallest < 0:
        raise DataError(f"{where}: tokens of at least 0 are required (got {smallest})")
    if vocab_size is not None and largest >= vocab_size:
        raise DataError(
            f"{where}: tokens below the model's {vocab_size} are required (got {largest}); use the tokenizer the model "
            f"was trained with, or resize the model's embedding to the tokenizer"
        )


def tokenise(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    budget: int | None,
    seed: int | None,
    cache_folder: str | Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> TokenisedDocuments:
    """Tokenises documents until the budget is reached or the data ends.

    The last document is cut at the budget, and only the bytes of its remaining tokens count. Data with fewer tokens
    than the budget is returned once; `PackedSequences` repeats it in a new order per epoch. Special tokens that are
    written in a text are recognised, as by default.

    Args:
        source: The documents.
        tokenizer: A fast tokenizer; its own bos/eos handling is off (see `document_start_token`).
        budget: Most tokens, start tokens included; None: all.
        seed: Seed for the order of documents; None: file order.
        cache_folder: Folder of the cache; None: no cache.
        on_progress: Called after every batch with the number of tokens so far.

    Raises:
        DataError: The budget is below 1, there is no text, or a file or the cache file is broken.
    """
    if budget is not None and budget < 1:
        raise DataError(f"data: a budget of at least 1 token is required (got {budget})")
    encoder = TextEncoder(tokenizer)
    if cache_folder is None:
        return _tokenise(source, encoder, budget, seed, on_progress)
    key = digest(["refold-tokens-1", *encoder.key(), source.identity, budget, seed])
    path = Path(cache_folder) / f"tokens-{key}.safetensors"
    if path.exists():
        return _load(path)
    tokenised = _tokenise(source, encoder, budget, seed, on_progress)
    _save(path, tokenised)
    return tokenised


def _tokenise(
    source: DataSource[str],
    encoder: TextEncoder,
    budget: int | None,
    seed: int | None,
    on_progress: Callable[[int], None] | None,
) -> TokenisedDocuments:
    encoding = Encoding(source.documents(seed), encoder, budget=budget, on_progress=on_progress)
    documents = [document for document in encoding if len(document.ids)]
    if not documents:
        raise DataError(f"data: at least one document that is not empty is required (got none in {source.name})")
    return TokenisedDocuments(
        tokens=np.concatenate([document.ids for document in documents]),
        offsets=np.cumsum([0, *(len(document.ids) for document in documents)], dtype=np.int64),
        byte_offsets=np.cumsum([0, *(document.num_bytes for document in documents)], dtype=np.int64),
        document_start=encoder.document_start,
        is_whole_source=encoding.is_whole_source,
    )


def _save(path: Path, tokenised: TokenisedDocuments) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    metadata = {
        "document_start": json.dumps(tokenised.document_start),
        "is_whole_source": json.dumps(tokenised.is_whole_source),
    }
    arrays = {name: getattr(tokenised, name) for name in ("tokens", "offsets", "byte_offsets")}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(arrays, unfinished, metadata)
            flush(unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: the token cache must be writable ({error}); free space or name another folder"
        ) from error


def _load(path: Path) -> TokenisedDocuments:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in ("tokens", "offsets", "byte_offsets")}
        return TokenisedDocuments(**arrays, **{name: json.loads(text) for name, text in metadata.items()})
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise DataError(f"{path}: a whole token cache is required ({error}); delete it to make it anew") from error


_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def scored_bytes(
    tokenised: TokenisedDocuments, tokenizer: PreTrainedTokenizerBase
) -> Int64[np.ndarray, "num_documents"]:
    """Returns the number of UTF-8 bytes of the scored tokens of each document.

    With a start token every token of a text is scored, so all bytes count. Without a start token the first token of a
    text is not scored, so its bytes do not count.
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
    # The token is a part of a character; byte-level vocabularies write each byte as one character.
    return len(name) if _REPLACEMENT in text else len(text.encode())
