"""Claims of Cross-Architecture Transfer Learning."""

from collections.abc import Sequence
from typing import Any

from refold.claims.claim import FRESH, NEAR, Claim, ClaimArm, Reading
from refold.claims.contrast import Contrast, better
from refold.claims.tasks import SpeedRatio, TaskShare
from refold.claims.token_ratio import TokenRatio
from refold.studies.baselines import scratch_plan

XATL = "Cross-Architecture Transfer Learning (arXiv 2404.02684)"
PAPER_STAGE = {"objective": "next_token", "warmup": 0.014, "weight_decay": 0.1}
THAWED = ({**PAPER_STAGE, "thaw": {"groups": ["transferred"], "when": "improvement", "latest": 0.5}},)
"""The protocol `xatl`."""


def retention(transfer: Sequence[str] = ("o_proj", "mlp"), **others: Any) -> dict[str, Any]:
    """Returns a recipe with retention in place of attention, with some linears taken over."""
    return {"mixers": [{"type": "retention", "transfer": list(transfer), **others}]}


TRANSFERRED = ClaimArm("retention, transferred", retention(), heal=THAWED, is_followed=True)
SCRATCH = ClaimArm(
    "retention, from scratch", retention(), twin=scratch_plan, heal=(PAPER_STAGE,), rates=FRESH, is_followed=True
)
TRANSFER = Claim(
    name="xatl-transfer",
    paper=XATL,
    statement="A model of linear cost that takes over embeddings, head, norms, MLPs and output projections of a "
    "pretrained transformer reaches the loss of one from scratch on up to 2.5 times fewer tokens, and is better at "
    "equal tokens.",
    figures="up to 2.5 times less training; up to 2.6 points more on language tasks at equal compute (abstract)",
    measurements=(TokenRatio(TRANSFERRED, SCRATCH), better(TRANSFERRED, SCRATCH)),
)
NEVER_FROZEN = ClaimArm("retention, transferred, never frozen", retention(), heal=(PAPER_STAGE,))
MLPS_ONLY = ClaimArm("retention, MLPs transferred", retention(["mlp"]), heal=(PAPER_STAGE,))
NO_LINEARS = ClaimArm("retention, embeddings and norms transferred", retention([]), heal=(PAPER_STAGE,))
HYBRID = ClaimArm("retention, two attention layers", retention(**{"except": "xatl"}), heal=(PAPER_STAGE,))
TRAINED_SOURCE = ClaimArm("the source, trained alike", {}, heal=(PAPER_STAGE,), rates=NEAR)
THAW = Claim(
    name="xatl-thaw",
    paper=XATL,
    statement="Freezing the transferred weights at first, and thawing them when the loss stops improving, beats "
    "training all weights from the start.",
    figures="the repository chooses the step of thawing by the loss (20k to 60k of 145k steps); no table",
    measurements=(better(TRANSFERRED, NEVER_FROZEN),),
)
PARTS = Claim(
    name="xatl-parts",
    paper=XATL,
    statement="Every transferred part helps: MLPs, and output projections beside them; MLPs most.",
    figures="three nested sets in the repository (without QKV, also without W_O, also without MLPs); one model card "
    "lists W_O as transferred, a later one does not",
    measurements=(
        better(MLPS_ONLY, NO_LINEARS),
        better(NEVER_FROZEN, MLPS_ONLY),
        Contrast(
            "MLPs are worth more than output projections",
            ((1.0, Reading(NO_LINEARS)), (-2.0, Reading(MLPS_ONLY)), (1.0, Reading(NEVER_FROZEN))),
        ),
    ),
    note="Never frozen in all of them, so that the parts alone differ.",
)
TWO_LAYERS = Claim(
    name="xatl-two-attention-layers",
    paper=XATL,
    statement="Two layers of softmax attention, the second and the middle one, close most of the gap between the "
    "linear model and the transformer.",
    figures="the hybrids of the repository keep attention in layers 1 and 11 of 24, and 1 and 7 of 16",
    measurements=(
        Contrast(
            "two attention layers close more than half of the gap",
            ((0.5, Reading(NEVER_FROZEN)), (0.5, Reading(TRAINED_SOURCE)), (-1.0, Reading(HYBRID))),
        ),
    ),
)
SCORE_AND_SPEED = Claim(
    name="xatl-score-at-speed",
    paper=XATL,
    statement="A transferred hybrid keeps at least 95% of the source's score on language tasks at 4 times its speed.",
    figures="up to 2.6 points more at equal compute (abstract); constant-size state, so that long texts are read and "
    "written faster; the target of 95% at 4 times is ours",
    measurements=(TaskShare(HYBRID, 0.95), SpeedRatio(HYBRID, 4.0)),
)
CLAIMS = (TRANSFER, THAW, PARTS, TWO_LAYERS, SCORE_AND_SPEED)
