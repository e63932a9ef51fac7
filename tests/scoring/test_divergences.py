import math

import pytest
import torch

from refold.scoring.divergences import DIVERGENCES


def _oracle(name: str, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(-1)

    m = (p + q) / 2
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: (kl(p, m) + kl(q, m)) / 2,
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[name]()


def _pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 7, 11, generator=generator, dtype=torch.float64) * 2
    return logits[0].requires_grad_(), logits[1]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_are_those_of_autograd_on_the_definition(name: str):
    student, teacher = _pair()
    expected = _oracle(name, student.softmax(-1), teacher.softmax(-1))
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    value, slope = DIVERGENCES[name](student.detach().log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(slope, gradient)
    assert gradient.abs().max() > 1e-2


@pytest.mark.parametrize("name", DIVERGENCES)
def test_arguments_are_left_as_they_are(name: str):
    student, teacher = (tensor.detach().log_softmax(-1) for tensor in _pair())
    before = student.clone(), teacher.clone()
    DIVERGENCES[name](student, teacher)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_distributions_diverge_by_nothing(name: str):
    student = _pair()[0].detach().log_softmax(-1)
    value, slope = DIVERGENCES[name](student, student)
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


def test_disjoint_distributions_reach_the_bounds():
    student = torch.tensor([[0.0, -200.0]], dtype=torch.float64).log_softmax(-1)
    teacher = student.flip(-1)
    assert float(DIVERGENCES["jensen_shannon"](student, teacher)[0]) == pytest.approx(math.log(2))
    assert float(DIVERGENCES["total_variation"](student, teacher)[0]) == pytest.approx(1)


def test_forward_and_reverse_are_told_apart():
    student, teacher = (tensor.detach().log_softmax(-1) for tensor in _pair())
    forward, reverse = DIVERGENCES["forward_kl"], DIVERGENCES["reverse_kl"]
    torch.testing.assert_close(forward(student, teacher)[0], reverse(teacher, student)[0])
    assert not torch.allclose(forward(student, teacher)[0], reverse(student, teacher)[0], rtol=1e-2)
