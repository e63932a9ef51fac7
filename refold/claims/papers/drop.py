"""Claims of LLM-Drop: layers that can be left out without training."""

import random
from typing import Any

from refold.claims.claim import Claim, ClaimArm, RecipeMaker
from refold.claims.contrast import better
from refold.sources.source_model import SourceModel

LLM_DROP = "LLM-Drop (arXiv 2406.15786)"
QUARTER, HALF = 0.25, 0.5
DRAWS = 8


def dropped(part: str, share: float) -> dict[str, Any]:
    """Returns a recipe that drops the parts of one kind that change the residual stream least."""
    return {"drop": {part: {"share": share, "by": "similarity"}}}


def drawn(part: str, share: float) -> RecipeMaker:
    """Returns a maker of recipes that drop parts of one kind drawn at random."""

    def make(model: SourceModel, seed: int) -> dict[str, Any]:
        layers = range(model.arch.num_layers)
        chosen = random.Random(seed).sample(layers, round(share * len(layers)))
        return {"drop": {part: {"layers": sorted(chosen)}}}

    return make


NO_ATTENTION = {
    share: ClaimArm(f"{share:.0%} of attention dropped", dropped("attention", share)) for share in (QUARTER, HALF)
}
NO_MLPS = {share: ClaimArm(f"{share:.0%} of MLPs dropped", dropped("mlp", share)) for share in (QUARTER, HALF)}
BY_CHANCE = ClaimArm(f"{HALF:.0%} of attention dropped by chance", drawn("attention", HALF), draws=DRAWS)
ATTENTION = Claim(
    name="drop-attention",
    paper=LLM_DROP,
    statement="Attention layers can be dropped at a smaller loss than MLPs, and layers chosen by the similarity of "
    "their input and output at a smaller loss than layers chosen by chance.",
    figures="Llama-2-13B and Mistral-7B keep over 99% of their score without 8 attention layers, and collapse without "
    "as many MLPs; Llama-2-70B without half of its attention loses 2.4% and is 48.4% faster",
    measurements=(
        *(better(NO_ATTENTION[share], NO_MLPS[share]) for share in (QUARTER, HALF)),
        better(NO_ATTENTION[HALF], BY_CHANCE),
    ),
    note="Without training. Equal shares of layers are compared, as in the paper; MLPs hold more parameters.",
)
CLAIMS = (ATTENTION,)
