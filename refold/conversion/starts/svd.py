"""The paper's start: each pair is the truncated SVD of what tying lost (arXiv 2410.20672, section 2.3)."""

import torch

from refold.conversion.starts.group import Fitted, LinearGroup
from refold.conversion.starts.zero import mean_weight, zero_pair
from refold.measuring.svd import SvdMode, Truncated, truncated_svd


def fit_svd(group: LinearGroup, svd: SvdMode) -> Fitted:
    """B = U_r S_r and A = V_r^T of residual = source weight minus stored weight; a zero residual gets the zero start.

    With two members and the mean of their weights stored, the residuals are opposite and one decomposition serves both.
    """
    stored = mean_weight(group.sources)
    relaxed = {depth: member for depth, member in group.members.items() if member.rank}
    mirrored = len(group.sources) == 2 and len(group.members) == 2
    shared: Truncated | None = None
    pairs, kept = {}, {}
    for depth, member in relaxed.items():
        residual = member.weight - stored
        if not bool(torch.any(residual)):
            pairs[depth], kept[depth] = zero_pair(stored, member.rank, group.seed + depth), 1.0
            continue
        if mirrored:
            if shared is None:
                most = max(other.rank for other in relaxed.values())
                shared = truncated_svd(residual, most, svd, group.seed)
                found = shared.take(slice(member.rank))
                sign = 1.0
            else:
                found, sign = shared.take(slice(member.rank)), -1.0
        else:
            found, sign = truncated_svd(residual, member.rank, svd, group.seed), 1.0
        a, b = found.factors()
        pairs[depth], kept[depth] = (a, b * sign), found.kept
    return Fitted(stored, pairs, kept)
