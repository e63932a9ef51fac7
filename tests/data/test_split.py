"""Held-out text by content."""

import pytest

from refold.data.readers import from_documents
from refold.data.split import cut, split
from refold.errors import DataError


def test_every_piece_falls_on_one_side() -> None:
    texts = [f"document {index}" for index in range(500)]
    train, held_out = split(from_documents(texts), every=10)
    sides = list(train.documents()), list(held_out.documents())
    assert sorted(sides[0] + sides[1]) == sorted(texts)
    assert 20 < len(sides[1]) < 80
    assert not set(sides[0]) & set(sides[1])
    assert train.identity != held_out.identity


def test_the_side_does_not_depend_on_order_and_equal_texts_stay_together() -> None:
    texts = [f"document {index}" for index in range(200)]
    _, one = split(from_documents(texts), every=10)
    _, other = split(from_documents(texts[::-1] + texts), every=10)
    assert set(one.documents()) == set(other.documents())


def test_one_long_text_is_cut_behind_lines_and_loses_nothing() -> None:
    text = "".join(f"line {index}\n" for index in range(20_000))
    pieces = list(cut(text, size=1000))
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)
    assert max(map(len, pieces)) <= 2000
    train, held_out = split(from_documents([text]))
    assert "".join(train.documents()) != text
    assert list(held_out.documents())


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="more text is required to hold some out"):
        split(from_documents(["a"]))
