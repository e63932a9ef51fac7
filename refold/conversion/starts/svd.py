"""The paper's initialisation: each pair is the truncated SVD of its residual (arXiv 2410.20672, section 2.3)."""

import torch

from refold.calibration.svd import SvdMode, Truncated
from refold.conversion.starts.group import Fitted, LinearGroup
from refold.conversion.starts.zero import mean_weight, zero_pair


def fit_svd(group: LinearGroup, svd: SvdMode) -> Fitted:
    """Fits B = U_r S_r and A = V_r^T to the residual: source weight minus stored weight, rounded to the stored dtype.

    A residual of zero gets a pair of `zero_pair`. With two members and the whole mean stored, the residuals are
    opposite except for rounding; without weighting, the singular vectors of one residual then serve both. If errors
    are weighted by the inputs of linears, the mean is weighted too.
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
