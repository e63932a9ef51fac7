import numpy as np
import pytest
import torch

from refold.evaluation.document_sums import DocumentSums, ratio_error
from refold.scoring.agreement import TokenScores


def test_windows_of_one_document_in_one_batch_are_added_up():
    sums = DocumentSums(3)
    labels = torch.tensor([[1, 2], [-100, 3], [4, -100]])
    scores = TokenScores(
        nll=torch.tensor([[1.0, 2.0], [0.0, 4.0], [8.0, 0.0]]),
        is_correct=torch.tensor([[True, False], [False, True], [False, False]]),
        agrees=torch.tensor([[True, True], [False, False], [True, False]]),
        kl=torch.tensor([[0.5, 0.5], [0.0, 0.25], [1.0, 0.0]]),
    )
    sums.add(torch.tensor([2, 2, 0]), labels, scores)
    sums.add(torch.tensor([2, 2, 0]), labels, scores)
    assert sums.nll.tolist() == [16, 0, 14]
    assert sums.kl.tolist() == [2, 0, 2.5]
    assert sums.num_tokens.tolist() == [2, 0, 6]
    assert sums.num_correct.tolist() == [0, 0, 4]
    assert sums.num_agreeing.tolist() == [2, 0, 4]
    total = sums.total()
    assert (total.nll, total.num_tokens, total.num_correct, total.num_agreeing, total.kl) == (30, 8, 4, 6, 4.5)


def test_scores_without_a_reference_leave_agreement_at_nothing():
    sums = DocumentSums(1)
    sums.add(torch.tensor([0]), torch.tensor([[5]]), TokenScores(torch.ones(1, 1), torch.ones(1, 1).bool(), None, None))
    assert (sums.nll[0], sums.num_agreeing[0], sums.kl[0]) == (1, 0, 0)


def test_equal_documents_have_no_error_and_unequal_ones_that_of_a_mean():
    same = np.full(4, 10, dtype=np.int64)
    assert ratio_error(np.full(4, 3.0), same) == 0
    amounts = np.array([1.0, 2.0, 3.0, 6.0])
    assert ratio_error(amounts, same) == pytest.approx(amounts.std(ddof=1) / 2 / 10)


def test_the_error_is_the_spread_of_repeated_samples():
    random = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(400):
        sizes = random.integers(50, 150, 60)
        amounts = sizes * random.normal(1.5, 0.2, 60)
        ratios.append(amounts.sum() / sizes.sum())
        errors.append(ratio_error(amounts, sizes))
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.1)


def test_one_document_has_no_error_and_empty_ones_do_not_count():
    assert ratio_error(np.array([3.0]), np.array([10])) is None
    assert ratio_error(np.array([3.0, 0.0]), np.array([10, 0])) is None
    two = ratio_error(np.array([3.0, 5.0]), np.array([10, 10]))
    assert ratio_error(np.array([3.0, 0.0, 5.0]), np.array([10, 0, 10])) == two
