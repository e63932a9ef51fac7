"""Scores summed by document, and standard errors of ratios of such sums."""

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from refold.data.packing import IGNORED
from refold.scoring.agreement import Scores, TokenScores

DocumentFloats = Float[np.ndarray, "num_documents"]
DocumentCounts = Int64[np.ndarray, "num_documents"]
_ALL = slice(None)


class DocumentSums:
    """Sums over the scored tokens of each document.

    Attributes:
        nll: Negative log-likelihood in nats, `[num_documents]` in float64.
        kl: KL divergence, likewise; 0 without a reference.
        num_tokens: Number of scored tokens.
        num_correct: Number of tokens that are the model's likeliest token.
        num_agreeing: Number of tokens where model and reference have the same likeliest token; 0 without a reference.
    """

    def __init__(self, num_documents: int):
        self.nll, self.kl = np.zeros(num_documents), np.zeros(num_documents)
        self.num_tokens, self.num_correct, self.num_agreeing = (
            np.zeros(num_documents, dtype=np.int64) for _ in range(3)
        )

    def add(self, documents: Int64[Tensor, "B"], labels: Int64[Tensor, "B T"], scores: TokenScores) -> None:
        """Adds the scores of a batch of windows to their documents."""
        index = documents.numpy()
        for total, column in (
            (self.nll, scores.nll),
            (self.kl, scores.kl),
            (self.num_tokens, labels != IGNORED),
            (self.num_correct, scores.is_correct),
            (self.num_agreeing, scores.agrees),
        ):
            if column is not None:
                # On the CPU, because not every device has float64.
                wide = column.cpu().double() if column.is_floating_point() else column.cpu()
                np.add.at(total, index, wide.sum(-1).numpy())

    def without_unscored(self, sizes: DocumentCounts) -> DocumentCounts:
        """Returns sizes with 0 for documents without a scored token, whose bytes are not predicted."""
        return np.where(self.num_tokens > 0, sizes, 0)

    def total(self, documents: slice = _ALL) -> Scores:
        """Returns the sums over documents; agreement and KL are meaningless without a reference.

        Args:
            documents: The range of documents; default all.
        """
        num_tokens = int(self.num_tokens[documents].sum())
        return Scores(
            nll=float(self.nll[documents].sum()),
            num_tokens=num_tokens,
            num_correct=int(self.num_correct[documents].sum()),
            num_compared=num_tokens,
            num_agreeing=int(self.num_agreeing[documents].sum()),
            kl=float(self.kl[documents].sum()),
        )


def ratio_error(amounts: DocumentFloats, sizes: DocumentCounts | DocumentFloats) -> float | None:
    """Returns the standard error of `sum(amounts) / sum(sizes)` over independent documents.

    The delta method for a ratio of means gives `sqrt(n / (n - 1) sum (a - r s)^2) / sum s` with r the ratio. If amounts
    are differences between two models on the same documents, the result is the error of the paired difference.

    Args:
        amounts: An amount for each document, such as nats.
        sizes: A size for each document, such as bytes; documents of size 0 do not count.

    Returns:
        The error in the ratio's unit; None with fewer than two documents.
    """
    counted = sizes > 0
    amounts, sizes = amounts[counted], sizes[counted]
    count = len(sizes)
    if count < 2:
        return None
    total = sizes.sum()
    residuals = amounts - amounts.sum() / total * sizes
    return float(np.sqrt(count / (count - 1) * np.square(residuals).sum()) / total)


def mean_error(values: DocumentFloats) -> float | None:
    """Returns the standard error of the mean of independent documents or items; None with fewer than two."""
    return ratio_error(values, np.ones_like(values))
