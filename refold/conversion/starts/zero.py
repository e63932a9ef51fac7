"""The usual LoRA initialisation: A Gaussian, B zero, so that the folded model equals the strict one at first."""

import torch
from torch import Tensor

from refold.calibration.svd import SvdMode
from refold.conversion.starts.group import Fitted, LinearGroup
from refold.nn.lora import Pair


def mean_weight(weights: tuple[Tensor, ...]) -> Tensor:
    """Returns the mean of a part's source weights; with one source the weight itself."""
    return weights[0] if len(weights) == 1 else torch.stack(weights).mean(dim=0)


def zero_pair(stored: Tensor, rank: int, seed: int) -> Pair:
    """Returns a pair that adds zero: A has standard deviation in^(-1/2) (arXiv 2106.09685), B is zero."""
    rows, columns = stored.shape
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, columns, generator=generator) * columns**-0.5
    return a, torch.zeros(rows, rank)


def fit_zero(group: LinearGroup, svd: SvdMode) -> Fitted:
    """Stores the mean of the sources, or the nearest matrix of the stored rank; pairs add zero."""
    stored = group.store(mean_weight(group.sources), svd)
    pairs = {
        depth: zero_pair(stored.weight, member.rank, group.seed + depth)
        for depth, member in group.members.items()
        if member.rank
    }
    return Fitted(stored, pairs, dict.fromkeys(pairs, 0.0))
