"""The texts of the claims: drawn documents of one window each, apart for the choice of rates and for the comparison."""

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from refold.claims.scale import ClaimScale
from refold.data.corpus import Data, open_text
from refold.data.mixture import MixedSource
from refold.data.readers import DataSource, from_documents
from refold.data.tokens import TokenisedDocuments, join_tokenised, scored_bytes, tokenise
from refold.errors import DataError

DRAW_SEED = 0
"""Seed of the drawn documents: the same at every scale and call."""
CHARACTERS_PER_TOKEN = 12
"""Characters of a document that are kept for each token of a window; well above the mean of any tokenizer."""
FEWEST_DOCUMENTS = 8


@dataclass(frozen=True)
class Domain:
    """Test documents of one kind of text.

    Attributes:
        name: Name on the page.
        documents: One window each.
        sizes: UTF-8 bytes of the scored tokens of each document, `[num_documents]`.
    """

    name: str
    documents: TokenisedDocuments
    sizes: np.ndarray


@dataclass(frozen=True)
class ClaimTexts:
    """All texts of a run.

    Attributes:
        train: Text for training and calibration.
        domains: Test documents; the first domain is that of the held-out text of the training domain.
        validation: Documents on which learning rates are chosen, from the first domain, none of them a test document.
        validation_text: The same as text, for curves during training.
        identity: Digest of the test and validation documents, for cache keys.
        names: Names of the texts by their use.
    """

    train: DataSource
    domains: tuple[Domain, ...]
    validation: Domain
    validation_text: DataSource
    identity: str
    names: dict[str, str]


def open_texts(train: Data, held_out: Data, tokenizer: PreTrainedTokenizerBase, scale: ClaimScale) -> ClaimTexts:
    """Draws and tokenises the documents of a scale.

    Args:
        train: Text for training.
        held_out: Held-out text; each of several paths is a domain, the training text's own first.
        tokenizer: The source's.
        scale: Numbers of documents.

    Raises:
        DataError: A text is missing, or has too few documents.
    """
    opened = open_text(held_out)
    parts = opened.parts if isinstance(opened, MixedSource) else (opened,)
    drawn = [
        _draw(part, scale.documents + (scale.validation_documents if number == 0 else 0), scale.context)
        for number, part in enumerate(parts)
    ]
    validating, drawn[0] = _divide(drawn[0], scale)
    names = _distinct([part.name for part in parts])
    for name, texts in zip(names, drawn, strict=True):
        if len(texts) < FEWEST_DOCUMENTS:
            raise DataError(
                f"{name}: at least {FEWEST_DOCUMENTS} held-out documents besides those for validation are required "
                f"(got {len(texts)}); give more text"
            )
    domains = tuple(_tokenise(name, texts, tokenizer, scale.context) for name, texts in zip(names, drawn, strict=True))
    source = open_text(train)
    digest = hashlib.sha256()
    for each in (*domains, validation := _tokenise("validation", validating, tokenizer, scale.context)):
        digest.update(each.documents.tokens.tobytes() + each.documents.offsets.tobytes())
    return ClaimTexts(
        source,
        domains,
        validation,
        from_documents(validating, name="validation documents"),
        digest.hexdigest(),
        {"training": source.name, "held-out": opened.name},
    )


def _draw(source: DataSource, count: int, context: int) -> list[str]:
    """Returns beginnings of drawn documents, long enough for a window."""
    length = CHARACTERS_PER_TOKEN * context
    texts = (text[:length] for text in source.documents(DRAW_SEED) if isinstance(text, str) and text.strip())
    return list(itertools.islice(texts, count))


def _divide(texts: list[str], scale: ClaimScale) -> tuple[list[str], list[str]]:
    """Returns the validation documents and the test documents; of little text a sixth is for validation."""
    count = scale.validation_documents
    if len(texts) < scale.documents + count:
        count = min(count, max(1, len(texts) // 6))
    return texts[:count], texts[count:]


def _tokenise(name: str, texts: list[str], tokenizer: PreTrainedTokenizerBase, context: int) -> Domain:
    # A window predicts one token more than it reads.
    parts = [tokenise(from_documents([text]), tokenizer, budget=context + 1, seed=None) for text in texts]
    documents = join_tokenised([part for part in parts if part.num_tokens > 1])
    return Domain(name, documents, scored_bytes(documents, tokenizer))


def _distinct(names: list[str]) -> list[str]:
    """Returns names of files, with the folder where two are alike, and with a number where these are alike too."""
    for parts in (1, 2):
        short = ["/".join(Path(name).parts[-parts:]) or name for name in names]
        if len(set(short)) == len(short):
            return short
    return [f"{name} ({number + 1})" for number, name in enumerate(short)]


def digest_of(*parts: object) -> str:
    """Returns a short digest of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
