"""Held-out text by content."""

import pytest

from refold.data.readers import from_documents
from refold.data.split import cut, halve, split, split_in_three
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


def test_a_held_out_text_is_halved_by_other_digits() -> None:
    texts = [f"text {index} " * 9 for index in range(2000)]
    _, rest = split(from_documents(texts))
    one, other = (list(each.documents()) for each in halve(rest))
    assert len(one) > len(other) / 2 > 0
    assert len(other) > len(one) / 2
    assert sorted(one + other) == sorted(rest.documents())
    with pytest.raises(DataError, match="more text is required for two halves"):
        halve(from_documents(texts[:1]))


def test_of_short_text_more_is_held_out_until_both_halves_have_some() -> None:
    text = from_documents(["".join(f"line {index}\n" for index in range(40_000))])
    with pytest.raises(DataError, match="two halves"):
        halve(split(text)[1])
    sides = [list(each.documents()) for each in split_in_three(text)]
    assert all(sides)
    assert len(sides[0]) > len(sides[1]) + len(sides[2])
    assert sum(len(each) for side in sides for each in side) == len("".join(text.documents()))
    with pytest.raises(DataError, match="more text is required"):
        split_in_three(from_documents(["a", "b"]))


def test_long_text_is_split_in_three_as_by_both_splits() -> None:
    texts = from_documents([f"text {index} " * 9 for index in range(2000)])
    train, rest = split(texts)
    assert [each.identity for each in split_in_three(texts)] == [each.identity for each in (train, *halve(rest))]
