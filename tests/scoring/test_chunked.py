from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refold.errors import HealError, SourceError
from refold.scoring import chunked, head_gradients
from refold.scoring.chunked import Objectives, chunked_loss
from refold.scoring.divergences import DIVERGENCES
from refold.scoring.head import Head, Predictions

VOCAB = 31
ALL = Objectives(0.7, dict.fromkeys(DIVERGENCES, 0.5) | {"forward_kl": 1.3}, temperature=2.0)
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 0.6, "softcap": 3.0},
    "lora": {"rank": 3},
    "lora and all": {"rank": 2, "bias": True, "scale": 0.6, "softcap": 3.0},
}


def _student(bias: bool = False, rank: int = 0, dtype: torch.dtype = torch.float64, **options: float) -> Predictions:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden, weight = draw(2, 9, 6), draw(VOCAB, 6)
    lora = (draw(rank, 6), draw(VOCAB, rank)) if rank else None
    return Predictions(hidden, Head(weight, draw(VOCAB) if bias else None, lora=lora, **options))


def _teacher() -> Predictions:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, 4, generator=generator, dtype=torch.float64)
    return Predictions(hidden, Head(weight, scale=1.5, softcap=4.0))


def _labels() -> Tensor:
    labels = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    labels[0, 3:5] = -100
    labels[1, -1] = -100
    return labels


def _naive(student: Predictions, labels: Tensor, objectives: Objectives, teacher: Predictions) -> dict[str, Tensor]:
    """Full logits, definitions, autograd."""
    kept = labels != -100
    logits = student.head.logits(student.hidden)[kept]
    q = (logits / objectives.temperature).softmax(-1)
    p = (teacher.head.logits(teacher.hidden)[kept] / objectives.temperature).softmax(-1)
    m = (p + q) / 2
    parts = {
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jensen_shannon": (p * (p / m).log() + q * (q / m).log()) / 2,
        "total_variation": (p - q).abs() / 2,
    }
    means = {name: part.sum(-1).mean() * objectives.temperature**2 for name, part in parts.items()}
    return {"cross_entropy": F.cross_entropy(logits, labels[kept]), **means}


def _total(means: dict[str, Tensor], objectives: Objectives) -> Tensor:
    weights = {"cross_entropy": objectives.cross_entropy, **objectives.divergences}
    return torch.stack([weights[name] * means[name] for name in weights]).sum()


def _tensors(student: Predictions) -> list[Tensor]:
    inputs = [student.hidden, student.head.weight, *(student.head.lora or ())]
    return inputs if student.head.bias is None else [*inputs, student.head.bias]


def _gradients(loss: Tensor, student: Predictions) -> list[Tensor]:
    return list(torch.autograd.grad(loss, _tensors(student)))


@pytest.mark.parametrize("positions_per_chunk", [1, 4, 100])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("objectives", [Objectives(), ALL, replace(ALL, cross_entropy=0.0, temperature=1.0)])
def test_values_and_gradients_are_those_of_full_logits(objectives, options, positions_per_chunk):
    student, teacher, labels = _student(**options), _teacher(), _labels()
    expected = _naive(student, labels, objectives, teacher)
    found = chunked_loss(student, labels, objectives, teacher=teacher, chunk_bytes=positions_per_chunk * 8 * VOCAB)
    assert found.num_tokens == 15
    assert list(found.means) == ["cross_entropy", *objectives.divergences]
    for name, mean in found.means.items():
        assert not mean.requires_grad
        torch.testing.assert_close(mean, expected[name])
    torch.testing.assert_close(found.total, _total(expected, objectives))
    pairs = zip(_gradients(found.total, student), _gradients(_total(expected, objectives), student), strict=True)
    for gradient, reference in pairs:
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_gradcheck(options):
    student, teacher, labels = _student(**options), _teacher(), _labels()

    def loss(hidden: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        lora = (rest[0], rest[1]) if student.head.lora else None
        head = replace(student.head, weight=weight, bias=rest[-1] if student.head.bias is not None else None, lora=lora)
        return chunked_loss(Predictions(hidden, head), labels, ALL, teacher=teacher, chunk_bytes=4 * 8 * VOCAB).total

    assert torch.autograd.gradcheck(loss, _tensors(student), fast_mode=True)


def test_the_comparison_notices_a_softcap_left_out_of_the_backward(monkeypatch):
    student, labels = _student(softcap=3.0), _labels()
    naive = _naive(student, labels, Objectives(), _teacher())["cross_entropy"]
    original = chunked._objectives

    def uncapped(logits: Tensor, labels: Tensor, target, objectives: Objectives, softcap, wants_slope: bool):
        assert softcap is not None
        return original(logits, labels, target, objectives, None, wants_slope)

    monkeypatch.setattr(chunked, "_objectives", uncapped)
    found = chunked_loss(student, labels)
    torch.testing.assert_close(found.total, naive)
    for gradient, reference in zip(_gradients(found.total, student), _gradients(naive, student), strict=True):
        assert (gradient - reference).norm() > 0.1 * reference.norm()


def test_a_tied_head_gets_both_shares_of_the_gradient():
    embedding = torch.randn(VOCAB, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    ids, labels = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(4)), _labels()

    def gradient(tied: bool, naive: bool) -> Tensor:
        hidden = torch.tanh(embedding[ids])
        head = Head(embedding if tied else embedding.detach())
        if naive:
            loss = F.cross_entropy(head.logits(hidden).flatten(0, 1), labels.flatten(), ignore_index=-100)
        else:
            loss = chunked_loss(Predictions(hidden, head), labels, chunk_bytes=8 * VOCAB * 4).total
        return torch.autograd.grad(loss, embedding)[0]

    torch.testing.assert_close(gradient(True, naive=False), gradient(True, naive=True))
    assert not torch.allclose(gradient(False, naive=False), gradient(True, naive=True), rtol=0.05)


def test_ignored_positions_give_no_gradient_and_all_ignored_give_zero():
    student, labels = _student(), _labels()
    (gradient,) = torch.autograd.grad(chunked_loss(student, labels).total, student.hidden)
    ignored = labels == -100
    assert not gradient[ignored].any()
    assert gradient[~ignored].any(-1).all()
    nothing = chunked_loss(student, torch.full_like(labels, -100))
    nothing.total.backward()
    assert (nothing.total.item(), nothing.num_tokens) == (0.0, 0)
    assert student.hidden.grad is not None
    assert not student.hidden.grad.any()


def test_micro_batches_with_a_common_denominator_add_up_to_one_batch():
    student, teacher, labels = _student(bias=True), _teacher(), _labels()
    whole = chunked_loss(student, labels, ALL, teacher=teacher)
    rows = [
        chunked_loss(
            Predictions(student.hidden[row], student.head),
            labels[row],
            ALL,
            teacher=Predictions(teacher.hidden[row], teacher.head),
            num_tokens=whole.num_tokens,
        )
        for row in range(2)
    ]
    torch.testing.assert_close(rows[0].total + rows[1].total, whole.total)
    for name in whole.means:
        torch.testing.assert_close(rows[0].means[name] + rows[1].means[name], whole.means[name])
    for split, together in zip(
        _gradients(rows[0].total + rows[1].total, student), _gradients(whole.total, student), strict=True
    ):
        torch.testing.assert_close(split, together)


def test_a_scaled_loss_scales_the_gradients_and_a_kept_graph_gives_them_twice():
    student, labels = _student(), _labels()
    loss = chunked_loss(student, labels).total
    once = torch.autograd.grad(loss, student.hidden, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(loss * 3, student.hidden, retain_graph=True)[0], once * 3)
    torch.testing.assert_close(torch.autograd.grad(loss, student.hidden)[0], once)


def test_a_frozen_head_costs_no_head_gradient(monkeypatch):
    student, labels = _student(), _labels()
    monkeypatch.setattr(head_gradients, "_accumulator", lambda *_: pytest.fail("a frozen head's gradient was made"))
    loss = chunked_loss(Predictions(student.hidden, student.head.detached()), labels).total
    (gradient,) = torch.autograd.grad(loss, student.hidden)
    assert gradient.any()


@pytest.mark.parametrize("trained", [0, 1])
def test_one_factor_of_a_lora_may_train_alone(trained):
    student, labels = _student(rank=3), _labels()
    assert student.head.lora is not None
    factors = [factor.detach() for factor in student.head.lora]
    factors[trained].requires_grad_()
    head = replace(student.head.detached(), lora=(factors[0], factors[1]))
    hidden = student.hidden.detach()
    found = torch.autograd.grad(chunked_loss(Predictions(hidden, head), labels).total, factors[trained])[0]
    logits = hidden @ (head.weight + factors[1] @ factors[0]).T
    naive = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(found, torch.autograd.grad(naive, factors[trained])[0])


def test_a_detached_head_has_a_detached_lora():
    lora = _student(rank=3).head.detached().lora
    assert lora is not None
    assert not any(factor.requires_grad for factor in lora)


def test_teacher_and_no_grad_get_no_gradient():
    student, teacher, labels = _student(), _teacher(), _labels()
    teacher.hidden.requires_grad_()
    teacher.head.weight.requires_grad_()
    chunked_loss(student, labels, ALL, teacher=teacher).total.backward()
    assert teacher.hidden.grad is None
    assert teacher.head.weight.grad is None
    with torch.no_grad():
        quiet = chunked_loss(student, labels, ALL, teacher=teacher)
    assert not quiet.total.requires_grad
    torch.testing.assert_close(quiet.total, chunked_loss(student, labels, ALL, teacher=teacher).total.detach())


@pytest.mark.parametrize("float32_share", [0.0, 1e9])
def test_bfloat16_is_near_double_however_the_head_gradient_is_summed(monkeypatch, float32_share):
    monkeypatch.setattr(head_gradients, "_FLOAT32_SHARE", float32_share)
    student = _student(bias=True, softcap=3.0, dtype=torch.bfloat16)
    exact = _student(bias=True, softcap=3.0)
    for rounded, full in zip(_tensors(student), _tensors(exact), strict=True):
        full.data.copy_(rounded.detach())
    teacher, labels = _teacher(), _labels()
    found = chunked_loss(student, labels, ALL, teacher=teacher, chunk_bytes=8 * VOCAB)
    expected = _total(_naive(exact, labels, ALL, teacher), ALL)
    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-2)
    for gradient, reference in zip(_gradients(found.total, student), _gradients(expected, exact), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - reference).norm() < 0.02 * reference.norm()


def test_autocast_keeps_the_dtypes_of_parameters():
    student, labels = _student(dtype=torch.float32), _labels()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_loss(student, labels).total
    exact = chunked_loss(student, labels).total
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert loss.item() != exact.item()
    for gradient, reference in zip(_gradients(loss, student), _gradients(exact, student), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - reference).norm() < 0.02 * reference.norm()


def test_memory_stays_far_below_full_logits():
    """Tensors alive at any moment, counted by wrapping every operation."""
    num_tokens, vocab_size, hidden_size = 512, 2048, 16
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, generator=generator).requires_grad_()
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    teacher = Predictions(hidden.detach(), Head(weight.detach() * 0.5))
    objectives = Objectives(1.0, {"forward_kl": 1.0})

    def chunked_step() -> None:
        chunked_loss(
            Predictions(hidden, Head(weight)), labels, objectives, teacher=teacher, chunk_bytes=32 * 4 * vocab_size
        ).total.backward()

    def naive_step() -> None:
        logits = F.linear(hidden, weight).log_softmax(-1)
        target = teacher.head.logits(teacher.hidden).log_softmax(-1)
        (F.nll_loss(logits, labels) + F.kl_div(logits, target, log_target=True, reduction="batchmean")).backward()

    assert _peak_bytes(chunked_step) < 0.15 * _peak_bytes(naive_step)


def _peak_bytes(step: Callable[[], None]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    recorded: Any = profile.profiler
    for event in recorded.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 0
    return peak


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergences": {"forward_k": 1.0}}, r"one of forward_kl, .* \(got 'forward_k'\); did you mean 'forward_kl'"),
        ({"divergences": {"forward_kl": -1.0}}, r"forward_kl: a weight of at least 0 is required \(got -1.0\)"),
        ({"cross_entropy": -0.5}, r"cross_entropy: a weight of at least 0 is required \(got -0.5\)"),
        ({"temperature": 0.0}, r"temperature: a number above 0 is required \(got 0.0\)"),
    ],
)
def test_objectives_that_mean_nothing_are_refused(options, message):
    with pytest.raises(HealError, match=message):
        Objectives(**options)


def test_divergences_need_a_teacher_of_the_same_vocabulary():
    student, labels = _student(), _labels()
    with pytest.raises(HealError, match=r"a teacher is required for forward_kl \(got none\)"):
        chunked_loss(student, labels, Objectives(divergences={"forward_kl": 1.0}))
    teacher = Predictions(student.hidden, Head(torch.ones(5, 6, dtype=torch.float64)))
    with pytest.raises(SourceError, match="share one vocabulary"):
        chunked_loss(student, labels, Objectives(divergences={"forward_kl": 1.0}), teacher=teacher)
