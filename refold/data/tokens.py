"""Tokenises documents in shuffled order up to a budget of tokens, and keeps the result on disk where asked."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from refold.data.readers import DataSource
from refold.errors import DataError

_BATCH_CHARACTERS = 2**20
_CHARACTERS_PER_TOKEN = 16  # well above any language's mean; only decides how much of a long last document is looked at


@dataclass(frozen=True)
class TokenisedDocuments:
    """Documents back to back in one flat array.

    Attributes:
        tokens: `[num_tokens]`, uint16 where the vocabulary is below 65,536, else uint32.
        offsets: int64 `[num_documents + 1]`; document d, with its start token, is `tokens[offsets[d]:offsets[d + 1]]`.
        byte_offsets: int64 `[num_documents + 1]`, running count of the UTF-8 bytes of the documents' texts (start
            tokens have none).
        document_start: id of the token put before each document, None where the tokenizer has neither bos nor eos.
        is_whole_source: whether the data ended before the budget did (then the arrays are one epoch of it).
    """

    tokens: np.ndarray
    offsets: np.ndarray
    byte_offsets: np.ndarray
    document_start: int | None
    is_whole_source: bool

    @property
    def num_tokens(self) -> int:
        """Tokens, start tokens included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents, the cut last one included."""
        return len(self.offsets) - 1

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return int(self.byte_offsets[-1])

    def document(self, index: int) -> np.ndarray:
        """Returns the tokens of one document, its start token included."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def document_start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the id put before each document: bos where the tokenizer has one, else eos, else None."""
    ids: Any = tokenizer  # transformers types every special token as str, int or lists of them
    return ids.bos_token_id if ids.bos_token_id is not None else ids.eos_token_id


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

    The last document is cut at the budget, and its bytes are those its kept tokens stand for. Data that holds less than
    the budget is returned once: whoever reads the tokens repeats them (`PackedSequences`, a new order per epoch).
    Special tokens written out in a text are recognised, as the tokenizer does by default.

    Args:
        source: the documents.
        tokenizer: a fast one; its own bos/eos handling is off, see `document_start_token`.
        budget: tokens, start tokens included; None: all.
        seed: order of documents; None: file order.
        cache_folder: where the result is kept and found again; None: nowhere.
        on_progress: called with the number of tokens so far after every batch.

    Raises:
        DataError: the budget is below 1, there is no text, a file is broken, or the cache file is.
    """
    if budget is not None and budget < 1:
        raise DataError(f"data: a budget of at least 1 token is required (got {budget})")
    if cache_folder is None:
        return _tokenise(source, tokenizer, budget, seed, on_progress)
    path = Path(cache_folder) / f"tokens-{_cache_key(source, tokenizer, budget, seed)}.safetensors"
    if path.exists():
        return _load(path)
    tokenised = _tokenise(source, tokenizer, budget, seed, on_progress)
    _save(path, tokenised)
    return tokenised


def _tokenise(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    budget: int | None,
    seed: int | None,
    on_progress: Callable[[int], None] | None,
) -> TokenisedDocuments:
    start = document_start_token(tokenizer)
    prefix = [] if start is None else [start]
    dtype = np.uint16 if len(tokenizer) < 2**16 else np.uint32
    arrays: list[np.ndarray] = []
    sizes: list[int] = []
    num_tokens = 0
    was_cut = False
    documents = source.documents(seed)
    while not was_cut and (budget is None or num_tokens < budget):
        remaining = None if budget is None else budget - num_tokens
        texts = list(_batch(documents, remaining))
        if not texts:
            break
        for text, ids in zip(texts, _encode(tokenizer, texts, remaining), strict=True):
            room = len(prefix) + len(ids) if budget is None else budget - num_tokens
            array = np.array((prefix + ids)[:room], dtype=dtype)
            was_cut = len(array) < len(prefix) + len(ids)
            size = len(text.encode())
            if was_cut:
                size = min(size, _num_bytes(tokenizer, ids[: len(array) - len(prefix)]))
            if len(array):
                arrays.append(array)
                sizes.append(size)
                num_tokens += len(array)
            if was_cut:
                break
        if on_progress is not None:
            on_progress(num_tokens)
    if not num_tokens:
        raise DataError(f"data: at least one document that is not empty is required (got none in {source.name})")
    return TokenisedDocuments(
        tokens=np.concatenate(arrays),
        offsets=np.cumsum([0, *map(len, arrays)], dtype=np.int64),
        byte_offsets=np.cumsum([0, *sizes], dtype=np.int64),
        document_start=start,
        is_whole_source=not was_cut and next(documents, None) is None,
    )


def _batch(documents: Iterator[str], remaining: int | None) -> Iterator[str]:
    """Takes documents of about a batch's characters, and not many more than the remaining budget can use."""
    limit = _BATCH_CHARACTERS if remaining is None else min(_BATCH_CHARACTERS, _CHARACTERS_PER_TOKEN * remaining)
    taken = 0
    while taken < limit and (text := next(documents, None)) is not None:
        taken += len(text)
        yield text


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], remaining: int | None) -> list[list[int]]:
    """Encodes texts; of one far longer than the remaining budget, only as much of its beginning as fills the budget."""
    if remaining is None:
        return _ids(tokenizer, texts)
    limit = _CHARACTERS_PER_TOKEN * (remaining + 256)
    encoded = _ids(tokenizer, [text[:limit] for text in texts])
    for index, text in enumerate(texts):
        # The cut changes the tokens beside it, so they must lie past the budget.
        if len(text) > limit and len(encoded[index]) < remaining + 256:
            encoded[index] = _ids(tokenizer, [text])[0]
    return encoded


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: a document longer than the model's context is no mistake here.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _num_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    text: Any = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return len(text.encode("utf-8", "replace"))


def _cache_key(source: DataSource, tokenizer: PreTrainedTokenizerBase, budget: int | None, seed: int | None) -> str:
    """Hash of everything the tokens depend on."""
    if tokenizer.is_fast:
        backend: Any = tokenizer.backend_tokenizer
        state = json.loads(backend.to_str())
        # Calls leave these two behind; encoding as done here sets them itself.
        del state["truncation"], state["padding"]
    else:
        state = sorted(tokenizer.get_vocab().items())
    key = [
        "refold-tokens-1",
        type(tokenizer).__name__,
        tokenizers.__version__,
        state,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        source.identity,
        budget,
        seed,
    ]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]


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
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
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
