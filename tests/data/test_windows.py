import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refold.data.packing import IGNORED
from refold.data.tokens import TokenisedDocuments
from refold.data.windows import sliding_windows, window_batches, window_spans
from refold.errors import DataError


@st.composite
def _context_and_stride(draw: st.DrawFn) -> tuple[int, int]:
    context = draw(st.integers(1, 20))
    return context, draw(st.integers(1, context))


def _documents(lengths: list[int]) -> TokenisedDocuments:
    """Tokens are 1, 2, 3, ... through all documents."""
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.uint16)
    return TokenisedDocuments(tokens, offsets, offsets, None, True)


def test_the_worked_example_of_the_docstring():
    names = "sabcdefgh"
    windows = sliding_windows(np.arange(9), context=4, stride=2)
    rows = [
        (
            "".join(names[token] for token in window.input_ids),
            "".join("." if label == IGNORED else names[label] for label in window.labels),
        )
        for window in windows
    ]
    assert rows == [("sabc", "abcd"), ("bcde", "..ef"), ("defg", "..gh")]


@given(st.integers(0, 70), _context_and_stride())
def test_every_token_but_the_first_is_scored_once_from_its_left(length: int, sizes: tuple[int, int]):
    context, stride = sizes
    scored: list[int] = []
    for number, window in enumerate(sliding_windows(np.arange(length), context, stride)):
        assert 1 <= len(window.input_ids) == len(window.labels) <= context
        for slot, label in enumerate(window.labels.tolist()):
            if label == IGNORED:
                continue
            assert window.input_ids[slot] == label - 1
            assert slot + 1 >= (min(context - stride + 1, label) if number else label)
            assert window.input_ids[0] == label - 1 - slot
            scored.append(label)
    assert scored == list(range(1, length))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), _context_and_stride(), st.integers(1, 5))
def test_batches_hold_every_window_once(lengths: list[int], sizes: tuple[int, int], batch_size: int):
    context, stride = sizes
    documents = _documents(lengths)
    expected = [
        (index, *(column.tolist() for column in window))
        for index in range(len(lengths))
        for window in sliding_windows(documents.document(index), context, stride)
    ]
    found = []
    widths = []
    for batch in window_batches(documents, context=context, stride=stride, batch_size=batch_size):
        assert len(batch.input_ids) <= batch_size
        assert batch.attention_mask.any(0).all()
        widths.append(batch.input_ids.shape[1])
        for ids, mask, labels, document in zip(*batch, strict=True):
            size = int(mask.sum())
            assert mask[:size].all()
            assert not ids[size:].any()
            assert (labels[size:] == IGNORED).all()
            found.append((int(document), ids[:size].tolist(), labels[:size].tolist()))
    assert sorted(found) == sorted(expected)
    assert widths == sorted(widths, reverse=True)
    assert len(window_spans(documents, context=context, stride=stride)) == len(expected)


def test_windows_of_unsigned_tokens_are_int64():
    (window,) = sliding_windows(np.array([1, 65535], dtype=np.uint16), 8, 4)
    assert window.labels.tolist() == [65535]
    assert window.input_ids.dtype == torch.int64


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_outside_the_context_is_refused(stride: int):
    message = rf"a stride between 1 and the context of 8 tokens is required \(got {stride}\)"
    with pytest.raises(DataError, match=message):
        sliding_windows(np.arange(9), 8, stride)
    with pytest.raises(DataError, match=message):
        next(window_batches(_documents([9]), context=8, stride=stride, batch_size=1))
