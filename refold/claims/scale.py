"""Scales of the claims: how many tokens, seeds and documents, and which claims."""

from collections.abc import Mapping
from dataclasses import dataclass

from refold.errors import RefoldError
from refold.suggest import must_be_one_of


@dataclass(frozen=True)
class ClaimScale:
    """The amounts of one scale.

    Attributes:
        name: Name for `--scale`.
        summary: One line for the user.
        tokens: Training tokens of each arm and seed.
        sweep_tokens: Training tokens of each learning rate tried.
        seeds: Seeds of the order of the data and of fresh weights.
        documents: Test documents of each domain, one window each.
        validation_documents: Documents on which learning rates are chosen.
        context: Tokens of a training sequence and of a test document.
        batch_tokens: Tokens of an optimizer step.
        first_rate: Index of the first learning rate tried: 0 for small steps, 1 for large ones.
        calibration_tokens: Tokens on which conversions measure influence and moments.
        task_items: Items of each few-shot task.
        claims: Names of the claims that are run; None: all.
    """

    name: str
    summary: str
    tokens: int
    sweep_tokens: int
    seeds: tuple[int, ...]
    documents: int
    validation_documents: int
    context: int
    batch_tokens: int
    first_rate: int
    calibration_tokens: int
    task_items: int
    claims: tuple[str, ...] | None = None

    def skips(self, claim: str) -> str | None:
        """Returns the reason why a claim is not run at this scale; None: it is run."""
        if self.claims is None or claim in self.claims:
            return None
        return f"`{self.name}` is a screen of {len(self.claims)} headline claims; --scale small runs all"


TINY = ClaimScale(
    name="tiny",
    summary="eight headline claims, under 90 minutes on two cores",
    tokens=40_960,
    sweep_tokens=8_192,
    seeds=(0, 1, 2),
    documents=96,
    validation_documents=16,
    context=256,
    batch_tokens=512,
    first_rate=0,
    calibration_tokens=16_384,
    task_items=100,
    claims=(
        "rrt-start-strict",
        "rrt-start-relaxed",
        "rrt-looping",
        "rrt-scratch",
        "rrt-distillation",
        "rrt-exits-after-healing",
        "xatl-transfer",
        "drop-attention",
    ),
)
SMALL = ClaimScale(
    name="small",
    summary="all claims, some hours to a day on a desktop",
    tokens=500_000,
    sweep_tokens=50_000,
    seeds=(0, 1, 2),
    documents=400,
    validation_documents=32,
    context=256,
    batch_tokens=2_048,
    first_rate=1,
    calibration_tokens=65_536,
    task_items=500,
)
GPU = ClaimScale(
    name="gpu",
    summary="all claims at real sizes, days on one GPU",
    tokens=50_000_000,
    sweep_tokens=2_000_000,
    seeds=(0, 1, 2),
    documents=2_000,
    validation_documents=128,
    context=1_024,
    batch_tokens=65_536,
    first_rate=1,
    calibration_tokens=262_144,
    task_items=500,
)
CLAIM_SCALES: Mapping[str, ClaimScale] = {scale.name: scale for scale in (TINY, SMALL, GPU)}


def find_scale(name: str) -> ClaimScale:
    """Returns a scale by its name.

    Raises:
        RefoldError: There is no such scale.
    """
    if name not in CLAIM_SCALES:
        raise RefoldError(f"scale: {must_be_one_of(name, CLAIM_SCALES)}")
    return CLAIM_SCALES[name]
