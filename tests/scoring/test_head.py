import pytest
import torch

from refold.errors import SourceError
from refold.scoring.head import Head, Predictions, check_same_vocabulary, chunks, scored_positions


def test_logits_add_bias_then_scale_then_cap():
    head = Head(torch.tensor([[1.0], [2.0]]), bias=torch.tensor([0.0, 1.0]), scale=3.0, softcap=5.0)
    expected = 5 * torch.tanh(torch.tensor([[6.0, 15.0]]) / 5)
    torch.testing.assert_close(head.logits(torch.tensor([[2.0]])), expected)


def test_a_lora_is_added_before_bias_scale_and_cap():
    weight, a, b = torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2)
    hidden, bias = torch.randn(3, 4), torch.randn(5)
    found = Head(weight, bias, scale=2.0, softcap=4.0, lora=(a, b)).logits(hidden)
    torch.testing.assert_close(found, Head(weight + b @ a, bias, scale=2.0, softcap=4.0).logits(hidden))
    # A LoRA in another dtype than the weight's, as in a float32 model scored in autocast, or a narrower head.
    narrow = Head(weight.bfloat16(), lora=(a, b)).logits(hidden)
    torch.testing.assert_close(narrow, hidden @ (weight + b @ a).T, rtol=0.05, atol=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = Head(weight, lora=(a, b)).logits(hidden)
    torch.testing.assert_close(mixed, narrow, rtol=0.02, atol=0.1)


def test_logits_of_half_precision_weights_are_float32_and_of_double_stay_double():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert Head(torch.ones(3, 2, dtype=dtype)).logits(torch.ones(1, 2, dtype=dtype)).dtype == expected


def test_chunks_cover_every_position_once_within_the_budget():
    for count in (0, 1, 15, 100, 1000):
        seen = [position for rows in chunks(count, 50, 2, 4 * 50 * 2 * 40) for position in range(rows.start, rows.stop)]
        assert seen == list(range(count))
    assert max(rows.stop - rows.start for rows in chunks(1000, 50, 2, 4 * 50 * 2 * 40)) == 32


def test_a_chunk_holds_one_position_where_the_budget_is_too_small_for_that():
    assert [rows.stop - rows.start for rows in chunks(3, 1000, 1, 8)] == [1, 1, 1]


def test_scored_positions_are_none_where_all_are_scored():
    assert scored_positions(torch.tensor([[0, 1], [2, 3]])) is None
    index = scored_positions(torch.tensor([[0, -100], [2, -100]]))
    assert index is not None
    assert index.tolist() == [0, 2]


def test_flat_predictions_keep_the_order_of_positions():
    hidden = torch.arange(8.0).reshape(2, 2, 2)
    flat = Predictions(hidden, Head(torch.ones(3, 2))).flat(torch.tensor([0, 3]))
    assert flat.hidden.tolist() == [[0, 1], [6, 7]]


def test_different_vocabularies_are_refused():
    with pytest.raises(SourceError, match=r"share one vocabulary \(got 3 and 4 tokens\); compare models that share"):
        check_same_vocabulary(Head(torch.ones(3, 2)), Head(torch.ones(4, 2)))
