"""A basis for all, coefficients for each: minimise sum_b |W_b - B_b A|_b^2 over A `[rank, in]` and B_b `[out, rank]`.

Where all depths see alike inputs, |E|_b^2 = |T_b E S|^2 with S S^T = C, the best A spans the leading right singular
vectors of the T_b W_b S stacked (Basis Sharing, arXiv 2410.03765). Where they do not, the paper takes the sum of their
second moments for C; here the search begins there. For given A the best coefficients are W_b C_b A^T (A C_b A^T)^-1,
whatever the T_b. For given coefficients the best A solves the linear equation
sum_b (B_b^T G_b B_b) A C_b = sum_b B_b^T G_b W_b C_b with G_b = T_b^T T_b, by conjugate gradients. Both in turn lower
the error by a quarter where inputs are each layer's own (those of `o_proj` and `down_proj`), by a percent elsewhere.

LoRAs beside a basis take what it leaves: `svd` once, `joint` in turn with it.
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
"""Of coefficients and basis in turn; further ones lower the error by less than a percent each."""
STEPS = 6
"""Of conjugate gradients in each round; each begins where the last ended."""
TURNS = 4
"""Of basis and LoRAs where they are fitted jointly."""
RIDGE = 1e-10
"""Share of the mean variance of a basis's outputs, so that a direction without any can be inverted."""
BasisInputs = Mapping[int, Float[Tensor, "in in"]]
"""C_b by depth."""


def fit_basis(group: LinearGroup, init: Literal["svd", "zero", "joint"], svd: SvdMode) -> FittedBasis:
    """Fits basis and coefficients to the weights of all depths, and LoRAs where some are relaxed.

    Args:
        group: The linear.
        init: How LoRAs start.
        svd: How matrices are decomposed.
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
    # W_b C_b, which both halves of a round need.
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
    """The best B_b for a basis, from W_b C_b."""
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
    """A better A for given coefficients: conjugate gradients from `a`, preconditioned by what they sum up to."""
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
