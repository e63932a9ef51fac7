"""Initialisation of a basis for all depths and coefficients for each: minimise
sum_b |W_b - B_b A|_b^2 over A `[rank, in]` and B_b `[out, rank]`.

If all depths have the same input moment, |E|_b^2 = |T_b E S|^2 with S S^T = C, the best A spans the leading right
singular vectors of the stacked T_b W_b S (Basis Sharing, arXiv 2410.03765). If the moments differ, the paper takes
their sum for C; here the search begins with that A. For given A the best coefficients are W_b C_b A^T (A C_b A^T)^-1,
whatever the T_b. For given coefficients the best A solves the linear equation
sum_b (B_b^T G_b B_b) A C_b = sum_b B_b^T G_b W_b C_b with G_b = T_b^T T_b, by conjugate gradients. Alternating
between the two lowers the error by a quarter for `o_proj` and `down_proj`, whose inputs differ between layers, and by a
percent for other linears.

LoRAs beside a basis are fitted to the residual of the basis: `svd` fits them once, `joint` alternates with the basis.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from refold.calibration.curves import GroupWeightings
from refold.calibration.svd import SvdMode, Truncated, truncated_svd
from refold.calibration.weighting import Weighting
from refold.conversion.starts.group import Basis, FittedBasis, LinearGroup
from refold.conversion.starts.zero import zero_pair

ROUNDS = 4
"""Alternations between coefficients and basis; each further one lowers the error by less than a percent."""
STEPS = 6
"""Steps of conjugate gradients in each round; a round begins with the basis of the round before."""
TURNS = 4
"""Alternations between basis and LoRAs if they are fitted jointly."""
RIDGE = 1e-10
"""Share of the mean variance of a basis's outputs, added so that the matrix can be inverted."""
BasisInputs = Mapping[int, Float[Tensor, "in in"]]
"""The moments C_b by depth."""


def fit_basis(group: LinearGroup, init: Literal["svd", "zero", "joint"], svd: SvdMode) -> FittedBasis:
    """Fits basis and coefficients to the weights of all depths, and LoRAs where some are relaxed.

    Args:
        group: The linear.
        init: Initialisation of LoRAs.
        svd: Algorithm of the singular value decomposition.
    """
    relaxed = {depth: member for depth, member in group.members.items() if member.rank}
    weightings = {depth: group.weighting(depth) for depth in group.members}
    corrections: dict[int, Truncated] = {}
    basis = _share({depth: member.weight for depth, member in group.members.items()}, weightings, group, svd)
    if init == "zero":
        like = next(iter(group.members.values())).weight
        pairs = {depth: zero_pair(like, member.rank, group.seed + depth) for depth, member in relaxed.items()}
        return FittedBasis(basis.a, basis.coefficients, pairs, dict.fromkeys(pairs, 0.0))
    for turn in range(TURNS if relaxed and init == "joint" else 1):
        if turn:
            left = {
                depth: member.weight - corrections[depth].matrix() if depth in corrections else member.weight
                for depth, member in group.members.items()
            }
            basis = _share(left, weightings, group, svd)
        for depth, member in relaxed.items():
            residual = member.weight - basis.weight(depth)
            if bool(torch.any(residual)):
                corrections[depth] = weightings[depth].truncate(residual, member.rank, svd, group.seed)
    pairs, kept = {}, {}
    for depth, member in relaxed.items():
        found = corrections.get(depth)
        zero = zero_pair(member.weight, member.rank, group.seed + depth)
        pairs[depth], kept[depth] = (zero, 1.0) if found is None else (found.factors(), found.kept)
    return FittedBasis(basis.a, basis.coefficients, pairs, kept)


def _share(
    weights: Mapping[int, Tensor], weightings: Mapping[int, Weighting], group: LinearGroup, svd: SvdMode
) -> Basis:
    assert group.basis_rank is not None
    inputs = {depth: weighting.inputs for depth, weighting in weightings.items()}
    outputs = {depth: weighting.outputs for depth, weighting in weightings.items()}
    stacked, common = (group.weightings or GroupWeightings(inputs, {})).stack(weights)
    if common.is_plain:
        a = truncated_svd(stacked, group.basis_rank, svd, group.seed).v.T
        return Basis(a.contiguous(), {depth: weight @ a.T for depth, weight in weights.items()}).rounded(group)
    a = common.truncate(stacked, group.basis_rank, svd, group.seed).v.T.double()
    moments = {depth: each.double() for depth, each in inputs.items() if each is not None}
    # The products W_b C_b, which both halves of a round need.
    seen = {depth: weight.double() @ moments[depth] for depth, weight in weights.items()}
    coefficients = _coefficients(seen, moments, a)
    for _ in range(ROUNDS):
        a = _basis(seen, moments, outputs, coefficients, a)
        coefficients = _coefficients(seen, moments, a)
    lengths = torch.linalg.vector_norm(a, dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    return Basis(
        (a / lengths[:, None]).float(), {depth: (each * lengths).float() for depth, each in coefficients.items()}
    ).rounded(group)


def _coefficients(seen: Mapping[int, Tensor], moments: BasisInputs, a: Float[Tensor, "rank in"]) -> dict[int, Tensor]:
    """Returns the best B_b for a basis, from the products W_b C_b."""
    found = {}
    for depth, each in seen.items():
        gram = a @ moments[depth] @ a.T
        gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) or 1.0)
        found[depth] = torch.linalg.solve(gram, a @ each.T).T
    return found


def _basis(
    seen: Mapping[int, Tensor],
    moments: BasisInputs,
    outputs: Mapping[int, Float[Tensor, "out out"] | None],
    coefficients: Mapping[int, Tensor],
    a: Float[Tensor, "rank in"],
) -> Float[Tensor, "rank in"]:
    """Returns a better A for given coefficients, by conjugate gradients from `a`.

    The preconditioner replaces the sum of Kronecker products by the product of the summed factors.
    """
    turned: dict[int, Tensor] = {}
    for depth, b in coefficients.items():
        output = outputs[depth]
        turned[depth] = b.T if output is None else b.T @ output.double()
    grams = {depth: turned[depth] @ coefficients[depth] for depth in turned}
    total, mean = sum(grams.values()), sum(moments.values())
    assert isinstance(total, Tensor)
    assert isinstance(mean, Tensor)
    total.diagonal().add_(RIDGE * float(total.diagonal().mean()) or 1.0)
    left, right = (torch.linalg.cholesky(each) for each in (total, mean))

    def precondition(residual: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(residual, left).T, right).T

    def apply(basis: Tensor) -> Tensor:
        return torch.stack([grams[depth] @ basis @ moments[depth] for depth in grams]).sum(dim=0)

    residual = torch.stack([turned[depth] @ seen[depth] for depth in turned]).sum(dim=0) - apply(a)
    step = better = precondition(residual)
    slope = first = float((residual * better).sum())
    for _ in range(STEPS):
        if slope <= 1e-12 * abs(first):
            break
        moved = apply(step)
        length = slope / float((step * moved).sum())
        a, residual = a + length * step, residual - length * moved
        better = precondition(residual)
        following = float((residual * better).sum())
        step, slope = better + following / slope * step, following
    return a
