"""Arms of Relaxed Recursive Transformers (arXiv 2410.20672) that several claims share."""

from collections.abc import Mapping
from typing import Any

from refold.claims.claim import FRESH, ClaimArm

RRT = "Relaxed Recursive Transformers (arXiv 2410.20672)"
UPTRAIN = ({"objective": "next_token"},)
"""Next-token prediction of all weights, as in appendix E of the paper."""
DISTIL = ({"objective": "distil"},)


def fold(init: str, **others: Any) -> Mapping[str, Any]:
    """Returns a recipe for two loops of layers with one initialisation, with an exit behind the first loop."""
    # An exit without weights of its own changes nothing until it is trained.
    block = {"loops": 2, "init": init, "uneven": "prelude"}
    return {"fold": block, "exits": {"at": "loops"}, **others}


def relaxed(init: str, lora: str, share: float) -> Mapping[str, Any]:
    """Returns a recipe for two loops with LoRAs of a share of the source's parameters."""
    return fold(init, relax={"rank": {"parameters": share}, "init": lora})


STRICT = ClaimArm("strict, Stepwise", fold("stepwise"), heal=UPTRAIN)
STRICT_AVERAGE = ClaimArm("strict, Average", fold("average"), heal=UPTRAIN)
STRICT_LOWER = ClaimArm("strict, Lower", fold("lower"), heal=UPTRAIN)
STRICT_RANDOM = ClaimArm("strict, random", fold("random"), heal=UPTRAIN, rates=FRESH)
STRICT_DISTILLED = ClaimArm("strict, distilled", fold("stepwise"), heal=DISTIL)
SHARES = (0.04, 0.08, 0.15, 0.3)
"""Shares of parameters in LoRAs: those of ranks 64, 128, 256 and 512 of the paper's Gemma 2B."""
LARGEST = SHARES[-1]
BY_RANK = {
    share: ClaimArm(f"relaxed {share:.0%}, Average + SVD", relaxed("average", "svd", share), heal=UPTRAIN)
    for share in SHARES
}
STEPWISE_BY_RANK = {
    share: ClaimArm(f"relaxed {share:.0%}, Stepwise + SVD", relaxed("stepwise", "svd", share), heal=UPTRAIN)
    for share in SHARES
}
RELAXED = BY_RANK[LARGEST]
RELAXED_ZERO = ClaimArm(f"relaxed {LARGEST:.0%}, Average + zero", relaxed("average", "zero", LARGEST), heal=UPTRAIN)
REDUCED = ClaimArm(
    "half the layers, from scratch",
    {"weights": "fresh", "drop": {"block": {"share": 0.5, "by": "even"}}},
    heal=UPTRAIN,
    rates=FRESH,
)
UNLOOPED = ClaimArm("the same layers, not looped", {"drop": {"block": {"share": 0.5, "by": "even"}}}, heal=UPTRAIN)
