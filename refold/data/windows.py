"""Cuts long documents into overlapping evaluation windows in which every token is scored once.

The rule. A document's first token (its start token, where the tokenizer has one) is never scored. Of the rest, the
first window scores as many as fit the context, each later window the next `stride` tokens; a window reaches back as far
as the context allows, so that a token of a later window is predicted from at least `context - stride + 1` tokens.

An example: tokens `s a b c d e f g h` (s is the start token), context 4, stride 2; `.` is a label that is not scored:

    inputs     labels
    s a b c    a b c d
    b c d e    . . e f
    d e f g    . . g h

With stride = context little is computed twice; with stride = 1 every token sees all that the context holds, at
`context` times the work. Figures compare only at the same context and stride: results state both.
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
    """One window: `labels[t]` is the token after `input_ids[t]`, `IGNORED` where an earlier window scored it."""

    input_ids: Int64[Tensor, "T"]
    labels: Int64[Tensor, "T"]


class WindowBatch(NamedTuple):
    """Windows padded on the right to the longest.

    Attributes:
        input_ids: 0 in the padding.
        attention_mask: True at tokens.
        labels: as in `Window`; `IGNORED` in the padding.
        documents: index of the document each window is of.
    """

    input_ids: Int64[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    labels: Int64[Tensor, "B T"]
    documents: Int64[Tensor, "B"]


def sliding_windows(tokens: np.ndarray, context: int, stride: int) -> list[Window]:
    """Cuts one document into windows by this module's rule.

    Args:
        tokens: integer ids `[n]` of one document, start token included. With fewer than two there is nothing to score.
        context: tokens a window's input may hold.
        stride: tokens scored by each window after the first, 1 to `context`.

    Raises:
        DataError: the stride does not lie between 1 and the context.
    """
    _check(context, stride)
    return [_window(tokens, *span) for span in _spans(len(tokens), context, stride)]


def window_batches(
    tokenised: TokenisedDocuments, *, context: int, stride: int, batch_size: int
) -> Iterator[WindowBatch]:
    """Yields the windows of all documents, longest first so that padding is small and too little memory shows at once.

    Args:
        tokenised: the documents.
        context: tokens a window's input may hold.
        stride: tokens scored by each window after the first.
        batch_size: windows per batch; the last batch may hold fewer.

    Raises:
        DataError: the stride does not lie between 1 and the context.
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
    """Lists `(document, start, stop, first)` of every window, longest first; `len` of it is the work ahead.

    The input is `document[start:stop]`; scored are the tokens `document[first : stop + 1]`.
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
