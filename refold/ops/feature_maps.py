"""Feature maps phi of linear attention, with phi(q) . phi(k) near exp(q . k). Inputs include the attention's scale."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

LARGEST_EXPONENT = 40.0
"""Largest exponent of a feature: a product of two features, summed over many tokens, stays within float32."""


def feature_map(
    name: str,
    x: Float[Tensor, "B T H K"],
    directions: Float[Tensor, "H K D"] | None,
    log_weights: Float[Tensor, "H D"] | None = None,
    is_query: bool = False,
) -> Float[Tensor, "B T H F"]:
    """Returns non-negative float32 features.

    Args:
        name: `elu` (elu + 1, arXiv 2006.16236), `relu`, `t2r` (a learned linear with relu, 2103.13076), `hedgehog`
            (softmax over learned projections and their negatives, 2402.04347), `favor` (positive random features,
            2009.14794), `dijiang` (the same with weighted directions of a cosine transform, 2403.19928).
        x: Queries or keys, each times the square root of the attention's scale.
        directions: Projection of the maps that have one.
        log_weights: Logarithms of the features' weights, for `dijiang`.
        is_query: Whether features may be scaled for each token; the normaliser cancels this scale.
    """
    x = x.float()
    if name == "elu":
        return nn.functional.elu(x) + 1
    if name == "relu":
        return nn.functional.relu(x)
    assert directions is not None
    directions = directions.float()
    along = torch.einsum("bthk,hkd->bthd", x, directions)
    if name == "t2r":
        return nn.functional.relu(along)
    if name == "hedgehog":
        return torch.cat((along, -along), dim=-1).softmax(dim=-1)
    # E_w exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2) = exp(q . k) for Gaussian w.
    exponents = along - x.square().sum(dim=-1, keepdim=True) / 2
    if log_weights is not None:
        exponents = exponents + log_weights.float()
    if is_query:
        exponents = exponents - exponents.amax(dim=-1, keepdim=True).detach()
    else:
        exponents = exponents.clamp(max=LARGEST_EXPONENT)
    return exponents.exp() * directions.shape[-1] ** -0.5
