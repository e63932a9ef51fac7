"""Scores summed by document, and how sure a figure made of them is."""

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
        nll: Nats, `[num_documents]` in float64.
        kl: Likewise; 0 without a reference.
        num_tokens: Scored tokens.
        num_correct: Of them, those predicted first.
        num_agreeing: Of them, those with the reference's likeliest token; 0 without a reference.
    """

    def __init__(self, num_documents: int):
        self.nll, self.kl = np.zeros(num_documents), np.zeros(num_documents)
        self.num_tokens, self.num_correct, self.num_agreeing = (
            np.zeros(num_documents, dtype=np.int64) for _ in range(3)
        )

    def add(self, documents: Int64[Tensor, "B"], labels: Int64[Tensor, "B T"], scores: TokenScores) -> None:
        """Adds the windows of a batch to the documents they are of."""
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

    def total(self, documents: slice = _ALL) -> Scores:
        """Returns the sums over documents; agreement and KL mean nothing without a reference.

        Args:
            documents: Which; all unless said otherwise.
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


def ratio_error(amounts: DocumentFloats, sizes: DocumentCounts) -> float | None:
    """Returns the standard error of `sum(amounts) / sum(sizes)` over independent documents.

    The delta method for a ratio of means: `sqrt(n / (n - 1) sum (a - r s)^2) / sum s` with r the ratio itself. Amounts
    may be differences between two models on the same documents; the error is then that of the paired difference.

    Args:
        amounts: For each document, such as nats.
        sizes: For each document, such as bytes; documents of size 0 do not count.

    Returns:
        The error in the ratio's unit, None with fewer than two documents.
    """
    counted = sizes > 0
    amounts, sizes = amounts[counted], sizes[counted]
    count = len(sizes)
    if count < 2:
        return None
    total = sizes.sum()
    residuals = amounts - amounts.sum() / total * sizes
    return float(np.sqrt(count / (count - 1) * np.square(residuals).sum()) / total)
