"""Top-k distributions with a bucket for all other tokens, against autograd on the definition."""

import math

import pytest
import torch
from torch import Tensor

from refold.errors import HealError
from refold.scoring.chunked import Objectives, chunked_loss
from refold.scoring.divergences import forward_kl
from refold.scoring.head import Head, Predictions
from refold.scoring.stored import StoredPredictions, likeliest, stored_forward_kl

VOCAB = 23


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def store(log_p: Tensor, k: int) -> StoredPredictions:
    return likeliest(Predictions(log_p, Head(torch.eye(log_p.shape[-1], dtype=log_p.dtype))), k)


def buckets(log_q: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of the k tokens, and of all others together."""
    q = log_q.exp()
    others = torch.ones_like(q).scatter(-1, ids, 0)
    return torch.cat((q.gather(-1, ids), (q * others).sum(-1, keepdim=True)), dim=-1)


def definition(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """KL over the k + 1 buckets; `teacher` are logits."""
    log_p = teacher.log_softmax(-1)
    ids = log_p.argsort(-1, descending=True)[..., :k]
    p, q = buckets(log_p, ids), buckets(student.log_softmax(-1), ids)
    if k == student.shape[-1]:
        p, q = p[..., :-1], q[..., :-1]
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("k", [1, 5, VOCAB - 1, VOCAB])
def test_value_and_gradient_are_those_of_autograd_on_the_definition(k):
    student, teacher = draw(7, VOCAB).requires_grad_(), draw(7, VOCAB, seed=1)
    expected = definition(student, teacher, k)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    log_q = student.detach().log_softmax(-1)
    before = log_q.clone()
    value, slope = stored_forward_kl(log_q, store(teacher, k))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(slope, gradient)
    assert gradient.abs().max() > 1e-2
    assert torch.equal(log_q, before)


def test_the_whole_vocabulary_gives_the_whole_divergence_and_less_gives_less():
    log_q, teacher = draw(7, VOCAB).log_softmax(-1), draw(7, VOCAB, seed=1)
    value, slope = forward_kl(log_q, teacher.log_softmax(-1))
    found, gradient = stored_forward_kl(log_q, store(teacher, VOCAB))
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(gradient, slope)
    assert (stored_forward_kl(log_q, store(teacher, 3))[0] < value - 1e-3).all()


def test_the_same_distribution_has_nothing_to_learn():
    teacher = draw(7, VOCAB)
    value, slope = stored_forward_kl(teacher.log_softmax(-1), store(teacher, 4))
    assert value.abs().max() < 1e-12
    assert slope.abs().max() < 1e-12


@pytest.mark.parametrize("k", [2, VOCAB])
def test_rounded_numbers_that_exceed_one_stay_a_distribution(k):
    teacher, log_q = draw(50, VOCAB), draw(50, VOCAB, seed=1).log_softmax(-1)
    exact = store(teacher, k)
    rounded = StoredPredictions(exact.ids, exact.log_probabilities.bfloat16(), exact.log_tail.bfloat16())
    sums = rounded.log_probabilities.double().exp().sum(-1) + rounded.log_tail.double().exp()
    assert (sums > 1.001).any()
    assert (sums < 0.999).any()
    own_value, _ = stored_forward_kl(teacher.log_softmax(-1), rounded)
    assert (own_value > -1e-12).all()  # a divergence between distributions is never negative
    value, slope = stored_forward_kl(log_q, rounded)
    torch.testing.assert_close(slope.sum(-1), torch.zeros(50, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(value, stored_forward_kl(log_q, exact)[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("gap", [5.0, 30.0, 80.0])
def test_a_tail_too_small_for_one_minus_the_rest_keeps_its_digits(gap):
    teacher = draw(5, VOCAB)
    teacher[:, :2] += gap
    student = draw(5, VOCAB, seed=1)
    student[:, :2] += gap
    stored = store(teacher.float(), 2)
    exact = store(teacher, 2)
    torch.testing.assert_close(stored.log_tail.double(), exact.log_tail, rtol=1e-5, atol=1e-5)
    assert (exact.log_tail < -gap + 8).all()
    value, slope = stored_forward_kl(student.float().log_softmax(-1), stored)
    expected, gradient = stored_forward_kl(student.log_softmax(-1), exact)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slope.double(), gradient, rtol=1e-4, atol=1e-6)


def test_a_student_far_surer_than_its_teacher_gets_a_finite_gradient():
    teacher, student = draw(5, VOCAB).float(), draw(5, VOCAB, seed=1).float()
    stored = store(teacher, 2)
    student.scatter_add_(1, stored.ids[:, :1], torch.full((5, 1), 300.0))
    value, slope = stored_forward_kl(student.log_softmax(-1), stored)
    assert torch.isfinite(value).all()
    assert torch.isfinite(slope).all()
    assert (slope.gather(1, stored.ids[:, :1]) > 0.1).all()


def test_likeliest_tokens_of_chunks_are_those_of_all():
    hidden, weight = draw(2, 9, 6), draw(VOCAB, 6, seed=1)
    predictions = Predictions(hidden, Head(weight, softcap=3.0))
    log_p = predictions.head.logits(hidden).log_softmax(-1)
    found = likeliest(predictions, 4, chunk_bytes=4 * 4 * VOCAB)
    top, ids = log_p.topk(4)
    assert found.ids.shape == (2, 9, 4)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.log_probabilities, top)
    torch.testing.assert_close(found.log_tail, (1 - top.exp().sum(-1)).log())


def test_all_tokens_leave_no_tail():
    assert (store(draw(3, VOCAB), VOCAB).log_tail == -math.inf).all()


@pytest.mark.parametrize("k", [0, VOCAB + 1])
def test_a_number_of_tokens_there_are_not_is_refused(k):
    with pytest.raises(HealError, match=rf"top_k: 1 to the vocabulary's {VOCAB} tokens are required \(got {k}\)"):
        store(draw(3, VOCAB), k)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("positions_per_chunk", [1, 4, 100])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0)])
def test_the_chunked_loss_learns_from_stored_predictions(softcap, positions_per_chunk, weights):
    hidden, weight = draw(2, 9, 6).requires_grad_(), draw(VOCAB, 6, seed=1).requires_grad_()
    student = Predictions(hidden, Head(weight, softcap=softcap))
    teacher = draw(2, 9, VOCAB, seed=2)
    labels = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    labels[0, 3:5] = -100
    found = chunked_loss(
        student,
        labels,
        Objectives(weights[0], {"forward_kl": weights[1]}),
        stored=store(teacher, 4),
        chunk_bytes=positions_per_chunk * 4 * VOCAB,
    )
    logits = student.head.logits(hidden)[labels != -100]
    kl = definition(logits, teacher[labels != -100], 4).mean()
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels[labels != -100])
    expected = weights[0] * cross_entropy + weights[1] * kl
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.means["forward_kl"], kl.detach())
    gradients = torch.autograd.grad(found.total, (hidden, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (hidden, weight)))
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)


def test_stored_predictions_of_everything_are_as_good_as_the_teacher():
    hidden, weight = draw(2, 9, 6).requires_grad_(), draw(VOCAB, 6, seed=1)
    student, teacher = Predictions(hidden, Head(weight)), Predictions(draw(2, 9, 4), Head(draw(VOCAB, 4)))
    labels = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    parts = Objectives(0.5, {"forward_kl": 0.5})
    losses = [
        chunked_loss(student, labels, parts, teacher=teacher),
        chunked_loss(student, labels, parts, stored=likeliest(teacher, VOCAB)),
    ]
    gradients = [torch.autograd.grad(loss.total, hidden)[0] for loss in losses]
    torch.testing.assert_close(losses[1].total, losses[0].total)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("parts", "got"),
    [
        (Objectives(0.5, {"reverse_kl": 0.5}), "reverse_kl at 1"),
        (Objectives(0.5, {"forward_kl": 0.5}, temperature=2.0), "forward_kl at 2"),
        (Objectives(0.5, {"forward_kl": 0.5, "total_variation": 1.0}), "forward_kl, total_variation at 1"),
    ],
)
def test_other_divergences_need_the_teacher_itself(parts, got):
    student = Predictions(draw(3, 6), Head(draw(VOCAB, 6)))
    with pytest.raises(HealError, match=rf"forward_kl at temperature 1 is required with stored .* \(got {got}\)"):
        chunked_loss(student, torch.zeros(3, dtype=torch.int64), parts, stored=store(draw(3, VOCAB), 2))
