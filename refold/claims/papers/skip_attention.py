"""Claim of Skip-Layer Attention: keys and values of an earlier layer beside a layer's own."""

from typing import Any

from refold.claims.claim import FRESH, Claim, ClaimArm
from refold.claims.contrast import better
from refold.claims.papers.recursive_arms import UPTRAIN
from refold.planning.plan import plan_model
from refold.recipe.load import load_recipe
from refold.sources.source_model import SourceModel


def skipping(model: SourceModel, seed: int) -> dict[str, Any]:
    """Makes the recipe of fresh weights in which half of the key-value heads are those of two layers before."""
    heads = range(max(1, model.arch.num_key_value_heads // 2))
    return {"weights": "fresh", "share_kv": {"from": {"back": 2}, "heads": list(heads)}}


def plain(model: SourceModel, seed: int) -> dict[str, Any]:
    """Makes the recipe of fresh weights without skips, with MLPs narrowed to the same number of parameters."""
    wanted = plan_model(model, load_recipe(skipping(model, seed)), allow_larger=True).cost
    missing = wanted.source.non_embedding_parameters - wanted.target.non_embedding_parameters
    arch = model.arch
    # Three matrices of a gated MLP hold one row or column of the hidden size for each neuron.
    neurons = round(missing / (3 * arch.hidden_size * arch.num_layers))
    width = {"mlp": [arch.intermediate_size - neurons] * arch.num_layers, "weight": "none"}
    return {"weights": "fresh", "width": width}


SKIPPING = ClaimArm("skip-layer attention, from scratch", skipping, heal=UPTRAIN, rates=FRESH)
PLAIN = ClaimArm("plain attention, from scratch", plain, heal=UPTRAIN, rates=FRESH)
SKIPS = Claim(
    name="skip-attention",
    paper="Skip-Layer Attention (arXiv 2406.11274)",
    statement="Some heads that take keys and values from an earlier layer instead of their own improve a language "
    "model at no extra cost.",
    figures="GPT-2 sizes on OpenWebText, best with 9 skip layers and 9 skip heads; perplexities were not found",
    measurements=(better(SKIPPING, PLAIN),),
    note="Stored parameters are equal: where skips save whole projections, the plain model has narrower MLPs; rows of "
    "single heads that are not used stay stored.",
)
CLAIMS = (SKIPS,)
