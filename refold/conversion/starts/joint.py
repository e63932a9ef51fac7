"""Stored weight and pairs fitted together: minimise sum_b ||W_b - W' - L_b||^2 over W' and L_b of rank r_b.

The paper's start spends both pairs of a two-loop fold on one subspace: its residuals are D/2 and -D/2 for
D = W_1 - W_2. Here the pairs share the singular directions of D, so that together they correct D to rank r_1 + r_2.
"""

import torch

from refold.conversion.starts.group import Fitted, LinearGroup, Member
from refold.conversion.starts.zero import mean_weight, zero_pair
from refold.measuring.svd import SvdMode, Truncated, truncated_svd

ROUNDS = 6
"""Alternating rounds for three and more members; further ones change the loss by less than a percent."""


def fit_joint(group: LinearGroup, svd: SvdMode) -> Fitted:
    """Closed form for two members, alternating minimisation for more; without pairs the mean."""
    members = dict(group.members)
    relaxed = [depth for depth, member in members.items() if member.rank]
    if not relaxed:
        return Fitted(mean_weight(group.sources))
    if len(members) == 2:
        corrections = _share_difference(members, svd, group.seed)
    else:
        corrections = _alternate(members, svd, group.seed)
    mean = torch.zeros_like(next(iter(members.values())).weight)
    for depth, member in members.items():
        found = corrections.get(depth)
        mean += (member.weight if found is None else member.weight - found.matrix()) / len(members)
    pairs, kept = {}, {}
    for depth in relaxed:
        found = corrections.get(depth)
        if found is None:
            pairs[depth], kept[depth] = zero_pair(mean, members[depth].rank, group.seed + depth), 1.0
            continue
        pairs[depth] = found.factors()
        residual = members[depth].weight - mean
        lost = torch.linalg.vector_norm(residual - found.matrix(), dtype=torch.float64).square()
        whole = torch.linalg.vector_norm(residual, dtype=torch.float64).square()
        kept[depth] = float(1 - lost / whole) if whole > 0 else 1.0
    return Fitted(mean, pairs, kept)


def _share_difference(members: dict[int, Member], svd: SvdMode, seed: int) -> dict[int, Truncated]:
    """Deals the singular directions of D = W_1 - W_2 to the two pairs in turn, largest first."""
    (first, one), (second, other) = members.items()
    difference = one.weight - other.weight
    if not bool(torch.any(difference)):
        return {}
    most = min(one.rank + other.rank, min(difference.shape))
    found = truncated_svd(difference, most, svd, seed)
    turns: dict[int, list[int]] = {first: [], second: []}
    for direction in range(most):
        free = [depth for depth in (first, second) if len(turns[depth]) < members[depth].rank]
        turns[min(free, key=lambda depth: len(turns[depth]))].append(direction)
    dealt = {depth: found.take(torch.tensor(taken, dtype=torch.long)) for depth, taken in turns.items()}
    dealt[second] = Truncated(-dealt[second].u, dealt[second].s, dealt[second].v, found.energy)
    return {depth: _fill(part, members[depth].rank, seed) for depth, part in dealt.items() if members[depth].rank}


def _fill(found: Truncated, rank: int, seed: int) -> Truncated:
    """Pads to the rank where D has too few directions for both pairs, as a zero start would: trainable, adding 0."""
    missing = rank - found.s.shape[0]
    if missing <= 0:
        return found
    a, b = zero_pair(found.u.new_empty(found.u.shape[0], found.v.shape[0]), missing, seed)
    widened = ((found.u, b), (found.v, a.T))
    u, v = (torch.cat((have, more.to(have.device)), dim=1) for have, more in widened)
    return Truncated(u, torch.cat((found.s, found.s.new_zeros(missing))), v, found.energy)


def _alternate(members: dict[int, Member], svd: SvdMode, seed: int) -> dict[int, Truncated]:
    """W' = mean(W_b - L_b), then L_b = SVD_r(W_b - W'), in turn."""
    corrections: dict[int, Truncated] = {}
    for _ in range(ROUNDS):
        mean = torch.zeros_like(next(iter(members.values())).weight)
        for depth, member in members.items():
            found = corrections.get(depth)
            mean += (member.weight if found is None else member.weight - found.matrix()) / len(members)
        for depth, member in members.items():
            residual = member.weight - mean
            if member.rank and bool(torch.any(residual)):
                corrections[depth] = truncated_svd(residual, member.rank, svd, seed)
    return corrections
