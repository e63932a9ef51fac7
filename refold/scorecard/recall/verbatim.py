"""Verbatim continuation: the next tokens of a text whose first tokens are given."""

import numpy as np

from refold.scorecard.job import ScoreJob
from refold.scorecard.openings import OpeningAmounts, read_openings
from refold.scorecard.recall.item import RecallCell, RecallItem

KIND = "verbatim"
CONTINUATION = 50
"""Tokens that are continued, as in the measurements of extractable text (arXiv 2202.07646)."""


def make_verbatim(job: ScoreJob, length: int) -> RecallCell:
    """Makes items of verbatim continuation from the openings of the job's documents.

    Each document gives its first tokens, the last 50 of which are answers. On training text the shares are what the
    model has memorised; on held-out text they are the floor that any good model of such text reaches.

    Args:
        job: The job, with its text.
        length: Tokens of an item.

    Raises:
        SectionNotRun: The job has no text, or no document is long enough.
    """
    text = read_openings(job, OpeningAmounts(job.settings.amounts.documents, length, length))
    is_answer = np.arange(length) >= length - CONTINUATION
    items = (RecallItem(text.document(index).astype(np.int64), is_answer) for index in range(text.num_documents))
    return RecallCell(KIND, length, None, tuple(items), None)
