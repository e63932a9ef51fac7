"""Plans of arms: drafts, training stages, and the keys under which their results are kept."""

from dataclasses import dataclass, field
from typing import Any

from refold.claims.claim import ClaimArm
from refold.claims.scale import ClaimScale
from refold.claims.texts import digest_of
from refold.conversion.measured import reads_text
from refold.planning.plan import Draft, plan_model
from refold.recipe.heal import HealStage
from refold.recipe.load import load_recipe
from refold.sources.source_model import SourceModel

CLAIMS_VERSION = 1
"""Version of the code that makes and measures arms: raised when the same arm would get other figures."""
RATE_HIDDEN_SIZE = 256
"""Hidden size for which the tried rates are written."""
NUM_TRIED = 3
"""Learning rates that are tried for each arm."""
SEED_STEP = 1_000
"""Distance of the seeds of an arm and of the arm that it goes on from, which so read other text."""


@dataclass(frozen=True)
class ArmPlanner:
    """Plans arms on one source at one scale.

    Attributes:
        model: The source.
        scale: Amounts.
        train: Identity of the training text.
    """

    model: SourceModel
    scale: ClaimScale
    train: str
    _drafts: dict[tuple[int, int], tuple[ClaimArm, Draft]] = field(default_factory=dict, compare=False)

    def draft(self, arm: ClaimArm, seed: int) -> Draft:
        """Plans the conversion of an arm for a seed.

        Raises:
            RecipeError: The recipe does not fit the source.
        """
        known = self._drafts.get((id(arm), seed))
        if known is None:
            made = self._draft(arm, seed, 0)
            made = self._draft(arm, seed, seed) if seed and has_fresh(made) else made
            # The arm is kept too, so that no other arm gets its id.
            known = self._drafts[id(arm), seed] = (arm, made)
        return known[1]

    def _draft(self, arm: ClaimArm, seed: int, fresh_seed: int) -> Draft:
        given = arm.recipe(self.model, seed) if callable(arm.recipe) else arm.recipe
        tokens = self.scale.calibration_tokens
        recipe = load_recipe(given, [f"calibration.tokens={tokens}", f"seed={fresh_seed}"])
        recipe = recipe.model_copy(update={"heal": ()})
        draft = plan_model(self.model, recipe, allow_larger=True)
        return draft if arm.twin is None else arm.twin(self.model, draft)

    def start_key(self, draft: Draft) -> str:
        """Returns the key of a conversion, made from all that it depends on."""
        plain = draft.model_dump(mode="json", include={"source", "recipe", "starts", "blueprint", "influence"})
        # Only hashes identify the source: the same weights may lie in another folder.
        plain["source"] = {key: value for key, value in plain["source"].items() if key.endswith("sha256")}
        return digest_of(CLAIMS_VERSION, plain, self.train if reads_text(draft) else "")

    def stages(self, arm: ClaimArm, rate: float, seed: int, tokens: int) -> tuple[HealStage, ...]:
        """Returns the training stages of an arm at a learning rate."""
        scale = self.scale
        fixed = {
            "learning_rate": rate,
            "batch_tokens": scale.batch_tokens,
            "context": scale.context,
            "seed": seed + SEED_STEP * len(arm.bases),
        }
        return tuple(
            HealStage.model_validate({**_without_share(stage), **fixed, "tokens": _share(stage, tokens)})
            for stage in arm.heal
        )

    def rates(self, arm: ClaimArm) -> tuple[float, ...]:
        """Returns the learning rates to try, scaled to the hidden size as in `refold.healing.defaults`."""
        factor = (RATE_HIDDEN_SIZE / self.model.arch.hidden_size) ** (2 / 3)
        first = self.scale.first_rate
        return tuple(float(f"{rate * factor:.2g}") for rate in arm.rates[first : first + NUM_TRIED])

    def tokens(self, arm: ClaimArm) -> int:
        """Returns the training tokens of an arm for one seed."""
        return round(self.scale.tokens * arm.tokens) if arm.heal else 0

    def sweep_tokens(self, arm: ClaimArm) -> int:
        """Returns the training tokens of one learning rate tried."""
        return round(self.scale.sweep_tokens * arm.tokens) if arm.heal else 0

    def arm_key(self, arm: ClaimArm) -> str:
        """Returns the key of an arm: arms of one key are made once."""
        seeds = range(arm.draws) if arm.draws else self.scale.seeds[:1]
        base = None if arm.base is None else self.arm_key(arm.base)
        starts = [] if arm.base else [self.start_key(self.draft(arm, seed)) for seed in seeds]
        return digest_of(base, starts, list(arm.heal), arm.rates if arm.heal else None, arm.tokens, arm.is_followed)

    def seeds(self, arm: ClaimArm) -> tuple[int, ...]:
        """Returns the seeds for which an arm is made; one, if no seed changes its model."""
        if arm.draws:
            return tuple(range(arm.draws))
        return self.scale.seeds if self._is_seeded(arm) else self.scale.seeds[:1]

    def _is_seeded(self, arm: ClaimArm) -> bool:
        if arm.heal:
            return True
        return self._is_seeded(arm.base) if arm.base else has_fresh(self.draft(arm, 0))


def has_fresh(draft: Draft) -> bool:
    """Tells whether a plan draws any weight at random."""
    return any(line.how == "fresh" for line in draft.lines)


def _without_share(stage: Any) -> dict[str, Any]:
    return {key: value for key, value in stage.items() if key != "share"}


def _share(stage: Any, tokens: int) -> int:
    return max(1, round(stage.get("share", 1.0) * tokens))
