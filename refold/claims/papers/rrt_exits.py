"""Claims of Relaxed Recursive Transformers about early exits."""

from typing import Any

from refold.claims.claim import Claim, ClaimArm, Reading
from refold.claims.contrast import Contrast, as_good, better
from refold.claims.papers.recursive_arms import RELAXED, RRT, STRICT, UPTRAIN, fold
from refold.sources.source_model import SourceModel

EXITS = ({"objective": {"exits": {"coefficient": 0.1}}},)
AFTER = ClaimArm("exits trained after healing", STRICT.recipe, base=STRICT, heal=EXITS)
NO_EXITS = ClaimArm("the same extra tokens, no exit loss", STRICT.recipe, base=STRICT, heal=UPTRAIN)
ALONG = ClaimArm("exits trained along", fold("stepwise"), heal=EXITS)
MARGIN = 0.01
"""Bits per byte that the last loop may lose and still count as kept; the paper's accuracies move by 0.2 points."""

AFTER_HEALING = Claim(
    name="rrt-exits-after-healing",
    paper=RRT,
    statement="Exits that are trained after healing, with 0.1 of the loss, keep the quality of the last loop; exits "
    "trained along with healing harm it.",
    figures="Gemma 2B strict, from 51.7 (section 3.7, appendix J): after healing 52.6 with exit 1 at 48.0; trained "
    "along 50.2 with 49.2",
    measurements=(
        as_good(AFTER, NO_EXITS, MARGIN),
        Contrast("exit 1 gains by its training", ((1.0, Reading(STRICT, 0)), (-1.0, Reading(AFTER, 0)))),
        better(STRICT, ALONG),
    ),
    note="The paper has no arm with the same extra tokens and no exit loss; the first comparison is against ours.",
)


def with_head_rank(model: SourceModel, seed: int) -> dict[str, Any]:
    """Makes the recipe of the strict model with a LoRA on the head of its exit, of a sixteenth of the hidden size."""
    rank = max(1, model.arch.hidden_size // 16)
    return {**fold("stepwise"), "exits": {"at": "loops", "head_rank": rank}}


HEADED = ClaimArm("strict, Stepwise, with a LoRA on the exit's head", with_head_rank, heal=UPTRAIN)
FROZEN = ClaimArm(
    "only the LoRA on the exit's head trained", with_head_rank, base=HEADED, heal=({**EXITS[0], "train": ["exits"]},)
)
AFTER_RELAXED = ClaimArm("exits trained after healing, relaxed 30%", RELAXED.recipe, base=RELAXED, heal=EXITS)
FROZEN_FAILS = Claim(
    name="rrt-exits-frozen",
    paper=RRT,
    statement="Training only a LoRA on the head of the exit, all else frozen, gives a useless exit.",
    figures="Gemma 2B strict, rank 128 (appendix J): exit 1 at 35.0 to 35.3, against 48.0 where all weights train",
    measurements=(
        Contrast("all weights make exit 1 better", ((1.0, Reading(FROZEN, 0)), (-1.0, Reading(AFTER, 0)))),
        Contrast(
            "the LoRA alone gains less than half of it",
            (
                (0.5, Reading(STRICT, 0)),
                (-0.5, Reading(AFTER, 0)),
                (-1.0, Reading(HEADED, 0)),
                (1.0, Reading(FROZEN, 0)),
            ),
        ),
    ),
    note="The LoRA has a sixteenth of the hidden size as its rank, as rank 128 of 2,048.",
)
RELAXATION = Claim(
    name="rrt-exits-relaxed",
    paper=RRT,
    statement="Relaxation hurts early exits: the exit of a relaxed model is worse than that of a strict one, although "
    "its last loop is better.",
    figures="60B tokens with distillation, then exits (section 3.7): Gemma exit 1 at 48.8 strict, 40.2 to 41.7 "
    "relaxed; TinyLlama 41.8 against 33.7 to 34.2; Pythia 42.0 against 37.1 to 38.2",
    measurements=(
        Contrast("the strict exit is better", ((1.0, Reading(AFTER_RELAXED, 0)), (-1.0, Reading(AFTER, 0)))),
        Contrast(
            "the relaxed exit is further behind its last loop",
            (
                (1.0, Reading(AFTER_RELAXED, 0)),
                (-1.0, Reading(AFTER_RELAXED)),
                (-1.0, Reading(AFTER, 0)),
                (1.0, Reading(AFTER)),
            ),
        ),
    ),
)
CLAIMS = (AFTER_HEALING, FROZEN_FAILS, RELAXATION)
