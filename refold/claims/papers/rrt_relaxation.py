"""Claims of Relaxed Recursive Transformers about ranks and prefixes."""

import itertools
from typing import Any

from refold.claims.claim import Claim, ClaimArm, Reading
from refold.claims.contrast import Contrast, better
from refold.claims.papers.recursive_arms import (
    BY_RANK,
    RRT,
    SHARES,
    STEPWISE_BY_RANK,
    STRICT_AVERAGE,
    UPTRAIN,
    fold,
)
from refold.planning.plan import plan_model
from refold.recipe.recipe import Recipe
from refold.sources.source_model import SourceModel

SMALLEST, _, MIDDLE, LARGEST = SHARES
RANK_PART = 8
"""Hidden size divided by the full rank of the split of ranks: 2,048 / 256 in the paper."""


def split_ranks(attention: float, mlp: float) -> Any:
    """Returns a maker of recipes with ranks of attention and MLPs, as shares of an eighth of the hidden size."""

    def make(model: SourceModel, seed: int) -> dict[str, Any]:
        full = model.arch.hidden_size / RANK_PART
        ranks = {"mixer": max(1, round(attention * full)), "mlp": max(1, round(mlp * full))}
        return {**fold("average"), "relax": {"rank": ranks, "init": "svd"}}

    return make


def prefixed(model: SourceModel, seed: int) -> dict[str, Any]:
    """Makes the recipe of prefixes with as many parameters as the smallest LoRAs."""
    costs = plan_model(model, Recipe(), allow_larger=True).cost.source
    budget = SMALLEST * costs.non_embedding_parameters
    length = max(1, round(budget / (model.arch.hidden_size * model.arch.num_layers)))
    return {**fold("average"), "relax": {"type": "prefix", "length": length}}


HALF_ATTENTION = ClaimArm("half the ranks of attention", split_ranks(0.5, 1.0), heal=UPTRAIN)
HALF_MLP = ClaimArm("half the ranks of MLPs", split_ranks(1.0, 0.5), heal=UPTRAIN)
PREFIXED = ClaimArm("prefixes of 4%, Average", prefixed, heal=UPTRAIN)
LORA = BY_RANK[SMALLEST]
U_SHAPE = Claim(
    name="rrt-start-u-shape",
    paper=RRT,
    statement="Stepwise layers with LoRAs from the SVD are U-shaped in the rank: middle ranks are worse than small and "
    "large ones.",
    figures="Gemma 2B, 15B tokens (appendix G): 51.8 at rank 64, 49.9 at 128, 47.8 at 256, 50.5 at 512; 51.7 without",
    measurements=tuple(better(STEPWISE_BY_RANK[end], STEPWISE_BY_RANK[MIDDLE]) for end in (SMALLEST, LARGEST)),
)
GROWTH = Claim(
    name="rrt-rank-growth",
    paper=RRT,
    statement="With Average + SVD quality grows with the rank.",
    figures="Gemma 2B, 15B tokens (table G.2): 52.1 at rank 64, 52.5 at 128, 54.2 at 256, 55.5 at 512; TinyLlama 43.4, "
    "44.0, 44.2, 44.8; Pythia 43.9, 44.1, 44.9, 45.6",
    measurements=tuple(better(BY_RANK[more], BY_RANK[less]) for less, more in itertools.pairwise(SHARES)),
)
MLP_RANKS = Claim(
    name="rrt-rank-split",
    paper=RRT,
    statement="The ranks of MLPs matter most: halving them costs more than halving the ranks of attention.",
    figures="Gemma 2B (table G.1): all ranks 256 54.2; attention 128 53.7; MLPs 128 53.3; all 128 52.5",
    measurements=(better(HALF_ATTENTION, HALF_MLP),),
    note="As in the paper the two do not save the same: most parameters are in MLPs.",
)
PREFIXES = Claim(
    name="rrt-prefixes",
    paper=RRT,
    statement="Prefixes for each loop gain little, far less than LoRAs of the same parameters.",
    figures="Gemma 2B, Average, 1.07B parameters (appendix H): prefixes 47.6, LoRA with SVD 52.1, neither 46.7",
    measurements=(
        better(LORA, PREFIXED),
        Contrast(
            "prefixes gain less than half of what LoRAs gain",
            ((-0.5, Reading(STRICT_AVERAGE)), (-0.5, Reading(LORA)), (1.0, Reading(PREFIXED))),
        ),
    ),
)
CLAIMS = (U_SHAPE, GROWTH, MLP_RANKS, PREFIXES)
