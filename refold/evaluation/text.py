"""The text of an evaluation: its files, its kinds, and its documents by hash."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from refold.checkpoint.manifest import hash_file
from refold.data.mixture import OTHER_KINDS, MixedSource
from refold.data.readers import DataSource
from refold.data.split import whole_name
from refold.data.tokens import TokenisedDocuments, join_tokenised, tokenise
from refold.errors import DataError
from refold.evaluation.result import DataFile, short_hash


def describe_data(source: DataSource) -> tuple[DataFile, ...]:
    """Returns name, size and hash of each file of a data source; documents in memory count as one file.

    Raises:
        DataError: A file cannot be read.
    """
    if isinstance(source, MixedSource):
        return tuple(file for part in source.parts for file in describe_data(part))
    if not source.files:
        num_bytes = sum(len(text.encode()) for text in source.documents())
        return (DataFile(name=source.name, bytes=num_bytes, sha256=source.identity),)
    paths = dict.fromkeys(source.files)
    try:
        return tuple(DataFile(name=str(path), bytes=path.stat().st_size, sha256=hash_file(path)) for path in paths)
    except OSError as error:
        raise DataError(f"data: readable files are required ({error.filename}: {error.strerror})") from error


class ReadText(NamedTuple):
    """Tokenised documents, ordered by kind of text.

    Attributes:
        documents: Documents of all kinds.
        kinds: Range of documents of each kind, by name; empty if there is only one kind.
    """

    documents: TokenisedDocuments
    kinds: dict[str, slice]


def read_text(source: DataSource, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> ReadText:
    """Tokenises documents in file order; several kinds of text share the tokens evenly.

    Raises:
        DataError: A kind has no text, or weights are given, which an evaluation does not use.
    """
    if not isinstance(source, MixedSource):
        return ReadText(tokenise(source, tokenizer, budget=max_tokens, seed=None), {})
    if source.weights is not None:
        raise DataError(
            f"data: files without weights are required for an evaluation, which reports each by itself (got "
            f"{source.name}); drop `=WEIGHT`"
        )
    parts: list[TokenisedDocuments] = []
    kinds: dict[str, slice] = {}
    left, first = max_tokens, 0
    for number, part in enumerate(source.parts):
        # If a kind is shorter than its share, the kinds after it get the rest.
        budget = None if left is None else max(1, left // (len(source.parts) - number))
        found = tokenise(part, tokenizer, budget=budget, seed=None)
        left = None if left is None else left - found.num_tokens
        name = part.name if part.name not in kinds else f"{part.name} ({number + 1})"
        kinds[name] = slice(first, first + found.num_documents)
        first += found.num_documents
        parts.append(found)
    return ReadText(join_tokenised(parts), kinds)


def describe_domain(fitted_to: Sequence[str], source: DataSource) -> tuple[str, ...]:
    """Returns a line if a model that was fitted to text is evaluated on no text that is surely of another kind.

    Kinds of text are told apart by the names of data sources: the line is for a single source, and for several that the
    model was fitted to.

    Args:
        fitted_to: Names of the texts that the model was fitted to.
        source: The evaluated text.
    """
    parts = source.parts if isinstance(source, MixedSource) else (source,)
    names = [whole_name(part.name) for part in parts]
    if not fitted_to or (len(parts) > 1 and not set(names) <= set(map(whole_name, fitted_to))):
        return ()
    return (
        f"the model was fitted to {_list(fitted_to)} and is evaluated on {_list(names)} alone: a loss on other kinds "
        f"of text does not show, and it can be several times as large ({OTHER_KINDS}); give text of another kind as a "
        f"second --data",
    )


def _list(names: Sequence[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def document_texts(source: DataSource, text: ReadText) -> Iterator[str]:
    """Yields the texts of tokenised documents, the last of each kind cut as there."""
    documents, kinds = text
    sizes = np.diff(documents.byte_offsets)
    parts = source.parts if isinstance(source, MixedSource) else (source,)
    ranges = list(kinds.values()) or [slice(0, documents.num_documents)]
    for part, rows in zip(parts, ranges, strict=True):
        # Without a start token, empty documents have no tokens and are dropped.
        texts = (each for each in part.documents() if each or documents.document_start is not None)
        for size, each in zip(sizes[rows], texts, strict=False):
            yield each.encode()[: int(size)].decode(errors="ignore")


def hash_documents(source: DataSource, text: ReadText) -> tuple[str, ...]:
    """Returns a short hash of each document's text, cut as it was tokenised: the same for every tokenizer."""
    return tuple(short_hash(each.encode()) for each in document_texts(source, text))
