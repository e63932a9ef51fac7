import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refold.data.packing import IGNORED, PackedSequences
from refold.errors import DataError

LENGTHS = st.lists(st.integers(1, 23), min_size=1, max_size=30)


def _packed(lengths: list[int], sequence_length: int, seed: int = 0) -> PackedSequences:
    """Every token is its own place in the stream plus one, so that nothing passes for the filling's zeros."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return PackedSequences(np.arange(1, offsets[-1] + 1, dtype=np.uint16), offsets, sequence_length, seed)


def _document(packed: PackedSequences, token: int) -> int:
    return int(np.searchsorted(packed.offsets, token - 1, side="right"))


@given(LENGTHS, st.integers(2, 17), st.integers(0, 3))
def test_every_token_is_in_every_epoch_exactly_once(lengths: list[int], sequence_length: int, epoch: int):
    packed = _packed(lengths, sequence_length)
    tokens = packed.batch(epoch * len(packed), len(packed)).input_ids.flatten()
    assert sorted(tokens[tokens > 0].tolist()) == list(range(1, sum(lengths) + 1))
    assert int((tokens == 0).sum()) == len(packed) * sequence_length - sum(lengths) < sequence_length


@given(LENGTHS, st.integers(2, 17))
def test_labels_are_the_next_token_of_the_same_piece_and_nothing_else(lengths: list[int], sequence_length: int):
    packed = _packed(lengths, sequence_length)
    for position in range(len(packed)):
        tokens, _, labels = (column.tolist() for column in packed.sequence(position))
        for slot, (token, label) in enumerate(zip(tokens, labels, strict=True)):
            following = tokens[slot + 1] if slot + 1 < sequence_length else 0
            is_inside = token and following and _document(packed, token) == _document(packed, following)
            assert label == (following if is_inside else IGNORED)


@given(LENGTHS, st.integers(2, 17))
def test_positions_count_from_each_piece(lengths: list[int], sequence_length: int):
    packed = _packed(lengths, sequence_length)
    for position in range(len(packed)):
        tokens, positions, _ = (column.tolist() for column in packed.sequence(position))
        expected, previous = -1, None
        for token, found in zip(tokens, positions, strict=True):
            document = _document(packed, token) if token else "filling"
            expected = expected + 1 if document == previous else 0
            assert found == expected
            previous = document


def test_a_worked_example():
    packed = _packed([3, 4, 2], 4)
    sequences = {tuple(packed.sequence(p).input_ids.tolist()): packed.sequence(p) for p in range(3)}
    assert set(sequences) == {(1, 2, 3, 4), (5, 6, 7, 8), (9, 0, 0, 0)}
    assert sequences[1, 2, 3, 4].position_ids.tolist() == [0, 1, 2, 0]
    assert sequences[1, 2, 3, 4].labels.tolist() == [2, 3, IGNORED, IGNORED]
    assert sequences[5, 6, 7, 8].position_ids.tolist() == [0, 1, 2, 0]
    assert sequences[5, 6, 7, 8].labels.tolist() == [6, 7, IGNORED, IGNORED]
    assert sequences[9, 0, 0, 0].position_ids.tolist() == [0, 0, 1, 2]
    assert sequences[9, 0, 0, 0].labels.tolist() == [IGNORED] * 4


def test_seeking_gives_what_reading_on_gives():
    sequential = _packed(list(range(1, 30)), 16, seed=5)
    rows = [sequential.sequence(position) for position in range(3 * len(sequential))]
    for position in (70, 3, 29, 0, 81):
        sought = _packed(list(range(1, 30)), 16, seed=5).batch(position, 2)
        for column in range(3):
            assert torch.equal(sought[column], torch.stack([rows[position][column], rows[position + 1][column]]))


def test_epochs_and_seeds_have_orders_of_their_own():
    packed = _packed([10] * 40, 16)
    other = _packed([10] * 40, 16, seed=1)
    size = len(packed)
    orders = [packed.batch(0, size), packed.batch(size, size), other.batch(0, size)]
    firsts = {tuple(order.input_ids[:, 0].tolist()) for order in orders}
    assert len(firsts) == 3
    assert tuple(range(1, 400, 16)) not in firsts


def test_batches_are_int64_of_batch_by_length():
    batch = _packed([10] * 40, 16).batch(3, 5)
    for column in batch:
        assert (column.shape, column.dtype) == ((5, 16), torch.int64)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(DataError, match=r"sequence length of at least 2 tokens is required \(got 1\)"):
        _packed([3], 1)
    with pytest.raises(DataError, match=r"at least one token is required \(got none\)"):
        PackedSequences(np.zeros(0, dtype=np.uint16), np.zeros(1, dtype=np.int64), 4, 0)


def test_tokens_that_are_no_targets_have_no_labels():
    tokens, offsets = np.arange(1, 24, dtype=np.uint16), np.array([0, 9, 23])
    is_target = tokens % 3 == 0
    plain, masked = (PackedSequences(tokens, offsets, 8, 0, targets) for targets in (None, is_target))
    for position in range(3):
        one, other = plain.sequence(position), masked.sequence(position)
        assert one.input_ids.equal(other.input_ids)
        assert other.labels.equal(torch.where(one.labels % 3 == 0, one.labels, IGNORED))
