"""The paper's start: each pair is the truncated SVD of what tying lost (arXiv 2410.20672, section 2.3)."""

import torch

from refold.calibration.svd import SvdMode, Truncated
from refold.conversion.starts.group import Fitted, LinearGroup
from refold.conversion.starts.zero import mean_weight, zero_pair


def fit_svd(group: LinearGroup, svd: SvdMode) -> Fitted:
    """B = U_r S_r and A = V_r^T of residual = source weight minus stored weight; a zero residual gets the zero start.

    The residual is taken to the weight as it is stored, rounded to the dtype of the target. With two members and the
    mean of their weights stored whole, the residuals are opposite (but for that rounding) and, where errors are not
    weighed, the singular vectors of one serve both. Where errors are weighed by the inputs of linears, so is the
    mean.
    """
    weighted = group.weightings is not None and len(group.sources) == len(group.members)
    mean = mean_weight(group.sources)
    if weighted:
        mean = group.mean({depth: member.weight for depth, member in group.members.items()})
    stored = group.store(mean, svd)
    relaxed = {depth: member for depth, member in group.members.items() if member.rank}
    mirrored = len(group.sources) == 2 and len(group.members) == 2
    mirrored = mirrored and group.weightings is None and stored.factors is None
    shared: Truncated | None = None
    pairs, kept = {}, {}
    for depth, member in relaxed.items():
        residual = member.weight - stored.weight
        if not bool(torch.any(residual)):
            pairs[depth], kept[depth] = zero_pair(residual, member.rank, group.seed + depth), 1.0
            continue
        if mirrored:
            if shared is None:
                most = max(other.rank for other in relaxed.values())
                shared = group.weighting(depth).truncate(residual, most, svd, group.seed)
                found = shared.take(slice(member.rank))
                sign = 1.0
            elif group.dtype == torch.float32:
                found, sign = shared.take(slice(member.rank)), -1.0
            else:
                found, sign = shared.take(slice(member.rank)).project(residual), 1.0
        else:
            found, sign = group.weighting(depth).truncate(residual, member.rank, svd, group.seed), 1.0
        a, b = found.factors()
        pairs[depth], kept[depth] = (a, b * sign), found.kept
    return Fitted(stored, pairs, kept)
