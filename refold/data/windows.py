"""Overlapping evaluation windows of long documents, in which every token is scored once.

The first token of a document (its start token, if the tokenizer has one) is never scored. The first window scores as
many tokens as fit the context, and each later window scores the next `stride` tokens. A window begins as early as the
context allows, so a token of a later window is predicted from at least `context - stride + 1` tokens.

Example: tokens `s a b c d e f g h` (s is the start token), context 4, stride 2; `.` is a label that is not scored:

    inputs     labels
    s a b c    a b c d
    b c d e    . . e f
    d e f g    . . g h

With stride = context almost nothing is computed twice. With stride = 1 every token is predicted from a full context, at
`context` times the work. Figures can be compared only at the same context and stride, so results state both.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from refold.data.packing import IGNORED
from refold.data.tokens import TokenisedDocuments
from refold.errors import DataError


class Window(NamedTuple):
    """One window: `labels[t]` is the token after `input_ids[t]`, or `IGNORED` if an earlier window scores it."""

    input_ids: Int64[Tensor, "T"]
    labels: Int64[Tensor, "T"]


class WindowBatch(NamedTuple):
    """A batch of windows, padded on the right.

    Attributes:
        input_ids: Token ids, 0 at padding.
        attention_mask: True at tokens, False at padding.
        labels: Labels as in `Window`, `IGNORED` at padding.
        documents: Index of the document of each window.
    """

    input_ids: Int64[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    labels: Int64[Tensor, "B T"]
    documents: Int64[Tensor, "B"]


def sliding_windows(tokens: np.ndarray, context: int, stride: int) -> list[Window]:
    """Returns the windows of one document.

    Args:
        tokens: Integer ids `[n]` of one document, start token included. Fewer than two give no window.
        context: Most tokens of a window's input.
        stride: Tokens scored by each window after the first, 1 to `context`.

    Raises:
        DataError: The stride is not between 1 and the context.
    """
    _check(context, stride)
    return [_window(tokens, *span) for span in _spans(len(tokens), context, stride)]


def window_batches(
    tokenised: TokenisedDocuments, *, context: int, stride: int, batch_size: int
) -> Iterator[WindowBatch]:
    """Yields batches of the windows of all documents, longest first.

    This order keeps padding small, and a lack of memory shows in the first batch.

    Args:
        tokenised: The documents.
        context: Most tokens of a window's input.
        stride: Tokens scored by each window after the first.
        batch_size: Windows per batch; the last batch may have fewer.

    Raises:
        DataError: The stride is not between 1 and the context.
    """
    spans = window_spans(tokenised, context=context, stride=stride)
    for first in range(0, len(spans), batch_size):
        rows = spans[first : first + batch_size]
        windows = [_window(tokenised.document(document), *span) for document, *span in rows]
        length = max(len(window.input_ids) for window in windows)
        input_ids = torch.zeros(len(windows), length, dtype=torch.int64)
        labels = torch.full((len(windows), length), IGNORED, dtype=torch.int64)
        attention_mask = torch.zeros(len(windows), length, dtype=torch.bool)
        for row, window in enumerate(windows):
            size = len(window.input_ids)
            input_ids[row, :size] = window.input_ids
            labels[row, :size] = window.labels
            attention_mask[row, :size] = True
        yield WindowBatch(input_ids, attention_mask, labels, torch.tensor([document for document, *_ in rows]))


def window_spans(tokenised: TokenisedDocuments, *, context: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Returns `(document, start, stop, first)` of every window, longest first.

    The input of a window is `document[start:stop]`; its scored tokens are `document[first : stop + 1]`.
    """
    _check(context, stride)
    lengths = np.diff(tokenised.offsets)
    spans = [
        (document, *span) for document, length in enumerate(lengths) for span in _spans(int(length), context, stride)
    ]
    return sorted(spans, key=lambda span: span[1] - span[2])


def _check(context: int, stride: int) -> None:
    if not 1 <= stride <= context:
        raise DataError(f"data: a stride between 1 and the context of {context} tokens is required (got {stride})")


def _spans(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    first = 1
    while first < length:
        end = min(first + (context if first == 1 else stride), length)
        yield max(0, end - 1 - context), end - 1, first
        first = end


def _window(tokens: np.ndarray, start: int, stop: int, first: int) -> Window:
    piece = torch.from_numpy(tokens[start : stop + 1].astype(np.int64))
    labels = piece[1:].clone()
    labels[: first - 1 - start] = IGNORED
    return Window(piece[:-1], labels)
