import pytest
import torch

from refold.modeling.masks import document_starts


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def test_one_document_per_row_needs_no_starts():
    assert document_starts(None, None, 0) is None
    assert document_starts(positions(5), None, 0) is None
    assert document_starts(positions(9)[:, 4:], None, 4) is None
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert document_starts(torch.tensor([[1, 1, 0, 1, 2]]), mask, 0) is None


def test_each_token_knows_where_its_document_began():
    found = document_starts(positions(2, 3, 1), None, 0)
    assert found is not None
    assert found.tolist() == [[0, 0, 2, 2, 2, 5]]


@pytest.mark.parametrize("past_length", [7, torch.tensor(7)])
def test_with_a_cache_slots_count_from_its_first_token(past_length):
    later = document_starts(torch.tensor([[3, 4, 0, 1]]), None, past_length)
    assert later is not None
    assert later.tolist() == [[4, 4, 9, 9]]


def test_masks_of_other_ranks_are_taken_as_they_are():
    assert document_starts(positions(2, 2), torch.ones(1, 1, 4, 4), 0) is None
