"""The openings of documents: the first tokens of documents that are drawn from the held-out text."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from refold.data.corpus import open_text
from refold.data.encoder import TextEncoder
from refold.data.mixture import MixedSource
from refold.data.tokens import TokenisedDocuments, require_known_tokens
from refold.evaluation.subject import require_tokenizer
from refold.scorecard.job import ScoreJob, SectionNotRun


@dataclass(frozen=True)
class OpeningAmounts:
    """Amounts of openings.

    Attributes:
        documents: Most documents.
        tokens: First tokens of each, start token included.
        least: Tokens below which a document is passed over, start token included.
    """

    documents: int
    tokens: int
    least: int = 2


def require_text(job: ScoreJob) -> None:
    """Checks that a job has text.

    Raises:
        SectionNotRun: It has none.
    """
    if job.data is None:
        raise SectionNotRun("held-out text is required (got none); give --data")


def draw_texts(job: ScoreJob) -> Iterator[str]:
    """Yields the documents of a job's text in the order of its seed; kinds of text take turns.

    Raises:
        SectionNotRun: The job has no text.
    """
    require_text(job)
    assert job.data is not None
    source, seed = open_text(job.data), job.settings.seed
    parts = source.parts if isinstance(source, MixedSource) else (source,)
    streams = [part.documents(seed) for part in parts]
    while streams:
        drawn = [(stream, next(stream, None)) for stream in streams]
        streams = [stream for stream, text in drawn if text is not None]
        yield from (text for _, text in drawn if text is not None)


def read_openings(job: ScoreJob, amounts: OpeningAmounts) -> TokenisedDocuments:
    """Reads the openings of drawn documents; models of one tokenizer get the same.

    Args:
        job: The job, with its text.
        amounts: Documents and tokens.

    Raises:
        SectionNotRun: The job has no text, or no document is long enough.
    """
    encoder = TextEncoder(require_tokenizer(job.subject))
    found = []
    texts = draw_texts(job)
    while len(found) < amounts.documents and (some := list(islice(texts, amounts.documents))):
        for document in encoder.encode(some, amounts.tokens):
            if len(document.ids) >= max(2, amounts.least) and len(found) < amounts.documents:
                found.append(encoder.cut(document, amounts.tokens))
    if not found:
        raise SectionNotRun(
            f"text with a document of at least {max(2, amounts.least)} tokens is required (got none); give longer ones"
        )
    tokens = np.concatenate([document.ids for document in found])
    require_known_tokens("data", tokens, job.subject.num_embeddings)
    return TokenisedDocuments(
        tokens=tokens,
        offsets=np.cumsum([0, *(len(document.ids) for document in found)], dtype=np.int64),
        byte_offsets=np.cumsum([0, *(document.num_bytes for document in found)], dtype=np.int64),
        document_start=encoder.document_start,
        is_whole_source=False,
    )


def fitting_opening(job: ScoreJob, tokens: int) -> int:
    """Returns a number of tokens, at most one more than the model's positions: the last one is only predicted."""
    positions = job.subject.positions
    return tokens if positions is None else min(tokens, positions + 1)
