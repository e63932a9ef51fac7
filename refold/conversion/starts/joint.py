"""Joint initialisation of stored weight and LoRA pairs: minimise
sum_b |W_b - W' - L_b|_b^2 over W' and L_b of rank r_b.

The paper's initialisation (`svd`) spends both pairs of a two-loop fold on one subspace: its residuals are D/2 and -D/2
for D = W_1 - W_2. Here the pairs share the singular directions of D, so that together they correct D to rank r_1 + r_2.

Errors may be weighted: |E|_b^2 = |T E S_b|^2 with S_b S_b^T = C_b, the second moment of the linear's inputs at depth b,
and T common to all depths. For given pairs the best W' is the mean of W_b - L_b weighted by the C_b. With this W', two
members have the error |T (D - L_1 + L_2) Q|^2 with Q Q^T = (C_1^-1 + C_2^-1)^-1. A truncated SVD minimises it, so two
loops have a closed form, with and without weighting.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from refold.calibration.svd import SvdMode, Truncated
from refold.calibration.weighting import Weighting
from refold.conversion.starts.group import Fitted, LinearGroup, Member, Stored
from refold.conversion.starts.zero import mean_weight, zero_pair

LOST = 10.0
"""Ratio of a pair's error to the rounding of the stored weight from which on the pair need not correct the rounding."""
ROUNDS = 6
"""Alternations for three or more members; further ones change the loss by less than a percent."""


def fit_joint(group: LinearGroup, svd: SvdMode) -> Fitted:
    """Fits the stored weight and the pairs of all depths.

    Two members and a whole stored weight have a closed form; other cases alternate. Without pairs the stored weight is
    the mean.
    """
    members = dict(group.members)
    relaxed = [depth for depth, member in members.items() if member.rank]
    if not relaxed:
        mean = mean_weight(group.sources)
        if group.weightings is not None and len(group.sources) == len(members):
            mean = group.mean({depth: member.weight for depth, member in members.items()})
        return Fitted(group.store(mean, svd))
    if len(members) == 2 and group.stored_rank is None:
        corrections = _share_difference(group, members, svd)
        stored = Stored(group.mean(_corrected(members, corrections)))
        stored, corrections = _as_stored(stored, corrections, group, svd)
    else:
        stored, corrections = _alternate(group, members, svd)
    pairs, kept = {}, {}
    for depth in relaxed:
        found = corrections.get(depth)
        if found is None:
            pairs[depth], kept[depth] = zero_pair(stored.weight, members[depth].rank, group.seed + depth), 1.0
            continue
        pairs[depth] = found.factors()
        residual, weighting = members[depth].weight - stored.weight, group.weighting(depth)
        whole = weighting.energy(residual)
        kept[depth] = max(0.0, 1 - weighting.energy(residual - found.matrix()) / whole) if whole > 0 else 1.0
    return Fitted(stored, pairs, kept)


def _corrected(members: Mapping[int, Member], corrections: Mapping[int, Truncated]) -> dict[int, Tensor]:
    """Returns W_b - L_b by depth."""
    return {
        depth: member.weight if depth not in corrections else member.weight - corrections[depth].matrix()
        for depth, member in members.items()
    }


def _share_difference(group: LinearGroup, members: dict[int, Member], svd: SvdMode) -> dict[int, Truncated]:
    """Assigns the singular directions of D = W_1 - W_2 alternately to the two pairs, largest first."""
    (first, one), (second, other) = members.items()
    difference = one.weight - other.weight
    if not bool(torch.any(difference)):
        return {}
    most = min(one.rank + other.rank, min(difference.shape))
    weighting = Weighting() if group.weightings is None else group.weightings.of_difference(difference)
    found = weighting.truncate(difference, most, svd, group.seed)
    turns: dict[int, list[int]] = {first: [], second: []}
    for direction in range(most):
        free = [depth for depth in (first, second) if len(turns[depth]) < members[depth].rank]
        turns[min(free, key=lambda depth: len(turns[depth]))].append(direction)
    dealt = {depth: found.take(torch.tensor(taken, dtype=torch.long)) for depth, taken in turns.items()}
    dealt[second] = Truncated(-dealt[second].u, dealt[second].s, dealt[second].v, found.energy)
    return {depth: _fill(part, members[depth].rank, group.seed) for depth, part in dealt.items() if members[depth].rank}


def _fill(found: Truncated, rank: int, seed: int) -> Truncated:
    """Pads a pair to its rank if D has too few directions; the padding adds 0 and is trainable, as in `zero_pair`."""
    missing = rank - found.s.shape[0]
    if missing <= 0:
        return found
    a, b = zero_pair(found.u.new_empty(found.u.shape[0], found.v.shape[0]), missing, seed)
    widened = ((found.u, b), (found.v, a.T))
    u, v = (torch.cat((have, more.to(have.device)), dim=1) for have, more in widened)
    return Truncated(u, torch.cat((found.s, found.s.new_zeros(missing))), v, found.energy)


def _alternate(group: LinearGroup, members: dict[int, Member], svd: SvdMode) -> tuple[Stored, dict[int, Truncated]]:
    """Alternates between W', the mean of W_b - L_b, and L_b, fitted to W_b - W'; once if nothing is stored."""
    corrections: dict[int, Truncated] = {}
    weightings = {depth: group.weighting(depth) for depth in members}
    stored = group.store(group.mean(_corrected(members, corrections)), svd)
    for turn in range(1 if group.stored_rank == 0 else ROUNDS):
        if turn:
            stored = group.store(group.mean(_corrected(members, corrections)), svd)
        for depth, member in members.items():
            residual = member.weight - stored.weight
            if member.rank and bool(torch.any(residual)):
                corrections[depth] = weightings[depth].truncate(residual, member.rank, svd, group.seed)
    if group.stored_rank is None:
        stored = Stored(group.mean(_corrected(members, corrections)))
        stored, corrections = _as_stored(stored, corrections, group, svd)
    return stored, corrections


def _as_stored(
    stored: Stored, corrections: dict[int, Truncated], group: LinearGroup, svd: SvdMode
) -> tuple[Stored, dict[int, Truncated]]:
    """Rounds a whole stored weight, and fits a pair again if the rounding matters beside the pair's error."""
    rounded = group.round(stored.weight)
    noise = float(torch.linalg.vector_norm(rounded - stored.weight))
    if not noise:
        return stored, corrections
    found = dict(corrections)
    for depth, member in group.members.items():
        residual = member.weight - rounded
        left = residual - corrections[depth].matrix() if depth in corrections else residual
        if member.rank and float(torch.linalg.vector_norm(left)) < LOST * noise:
            found[depth] = group.weighting(depth).truncate(residual, member.rank, svd, group.seed)
    return Stored(rounded), found
