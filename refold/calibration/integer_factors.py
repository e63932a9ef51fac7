"""Rounding of the two factors of a low-rank weight: the scale between them, and the fit of the second to the first."""

import torch
from jaxtyping import Float
from torch import Tensor

from refold.blueprint.integers import Scheme
from refold.calibration.feedback import round_with_feedback
from refold.nn.rounding import Rounded

NOISE = 1.0
"""Expected error of a rounded number, as a share of the square of the largest in its group times 4 to the power of the
bits. The fit of the second factor must not make numbers larger than the rounding of its group allows."""


def balance_factors(
    a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"]
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """Returns factors with the same product whose columns of B have length 1.

    Groups of A share a scale inside a row, so rows of any length cost nothing. Groups of B share a scale across ranks,
    where columns of different length would waste integers.
    """
    lengths = torch.linalg.vector_norm(b, dim=0)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return a * lengths.unsqueeze(1), b / lengths


def refit_second(
    a: Float[Tensor, "rank in"],
    rounded: Float[Tensor, "rank in"],
    b: Float[Tensor, "out rank"],
    moment: Tensor,
    bits: int,
) -> Float[Tensor, "out rank"]:
    """Returns the factor B' that minimises E|B A x - B' A' x|^2 for a rounded A', plus a ridge towards B.

    Args:
        a: A before rounding.
        rounded: A'.
        b: The factor that goes with A.
        moment: Second moment of the inputs `[in, in]`, up to a factor.
        bits: Bits to which B' will be rounded, which set the ridge.
    """
    wide, narrow = moment.double(), rounded.double()
    seen = narrow @ wide
    gram, crossed = seen @ narrow.T, seen @ a.double().T
    diagonal = gram.diagonal()
    if float(diagonal.max()) <= 0:
        return b
    ridge = NOISE * 4.0**-bits * diagonal.clamp(min=float(diagonal.mean()))
    aimed = (crossed @ b.double().T) + ridge.unsqueeze(1) * b.double().T
    return torch.linalg.solve(gram + torch.diag(ridge), aimed).T.to(b.dtype).contiguous()


def round_factors(
    a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"], moment: Float[Tensor, "in in"], scheme: Scheme
) -> tuple[Rounded, Rounded]:
    """Rounds both factors of a weight B A with error feedback; B is fitted to the rounded A before.

    Args:
        a: The factor that reads the inputs.
        b: The factor that reads the outputs of A.
        moment: Second moment of the inputs, up to a factor.
        scheme: The scheme of both.
    """
    a, b = balance_factors(a.float(), b.float())
    first = round_with_feedback(a, moment, scheme)
    value = first.dequantise()
    fitted = refit_second(a, value, b, moment, scheme.bits)
    return first, round_with_feedback(fitted, value @ moment.to(value.dtype) @ value.T, scheme)
