"""Divergences between next-token distributions, with their gradients in closed form.

Let p be the teacher's distribution and q = softmax(z) the student's. If the derivative of a divergence with respect to
q is a(q) up to a constant, the gradient with respect to the student's logits is `q * (a - sum(q * a))`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

LogProbabilities = Float[Tensor, "M N"]
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log-probabilities of student, of teacher) -> (nats per position `[M]`, gradient for student logits `[M, N]`)."""


def forward_kl(student: LogProbabilities, teacher: LogProbabilities) -> tuple[Float[Tensor, "M"], LogProbabilities]:
    """Returns `KL(p || q) = sum p (log p - log q)` with gradient `q - p` (Hinton et al., arXiv 1503.02531)."""
    p = teacher.exp()
    value = (teacher - student).mul_(p).sum(-1)
    return value, student.exp().sub_(p)


def reverse_kl(student: LogProbabilities, teacher: LogProbabilities) -> tuple[Float[Tensor, "M"], LogProbabilities]:
    """Returns `KL(q || p) = sum q (log q - log p)` (MiniLLM, arXiv 2306.08543, equation 1)."""
    q = student.exp()
    slope = student - teacher
    value = (q * slope).sum(-1)
    return value, slope.sub_(value[:, None]).mul_(q)


def jensen_shannon(student: LogProbabilities, teacher: LogProbabilities) -> tuple[Float[Tensor, "M"], LogProbabilities]:
    """Returns `(KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2`; at most log 2."""
    mixture = torch.logaddexp(student, teacher).sub_(_LOG_2)
    p_part = (teacher - mixture).mul_(teacher.exp()).sum(-1)
    q = student.exp()
    slope = student - mixture
    q_part = (q * slope).sum(-1)
    return (p_part + q_part) / 2, slope.sub_(q_part[:, None]).mul_(q).div_(2)


def total_variation(
    student: LogProbabilities, teacher: LogProbabilities
) -> tuple[Float[Tensor, "M"], LogProbabilities]:
    """Returns `sum |p - q| / 2`, at most 1 (f-DISTILL, arXiv 2307.15190)."""
    q = student.exp()
    difference = q - teacher.exp()
    value = difference.abs().sum(-1).div_(2)
    slope = difference.sign_().div_(2)
    return value, (slope - (q * slope).sum(-1, keepdim=True)).mul_(q)


_LOG_2 = 0.6931471805599453

DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
}
