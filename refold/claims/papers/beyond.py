"""Claims beyond the papers: recursion with linear mixers, and folds against the rivals that the papers leave out."""

import contextlib
from collections.abc import Callable
from typing import Any

from refold.claims.arm_maker import MEMORY_TOKENS
from refold.claims.claim import Claim, ClaimArm, RecipeMaker
from refold.claims.contrast import better
from refold.claims.papers.recursive_arms import DISTIL, LARGEST, fold, relaxed
from refold.errors import RecipeError
from refold.planning.plan import plan_model
from refold.recipe.load import load_recipe
from refold.recipe.recipe import Recipe
from refold.sources.source_model import SourceModel

OURS = "refold (no paper)"
LORA_SHARE = 0.1


def recursive(model: SourceModel) -> dict[str, Any]:
    """Returns the recipe of two relaxed loops."""
    return {
        "fold": {"loops": 2, "uneven": "prelude"},
        "relax": {"rank": {"parameters": LORA_SHARE}, "init": "joint", "vectors": "own"},
    }


def hybrid(model: SourceModel) -> dict[str, Any]:
    """Returns the recipe of a gated delta rule in all layers but two, which two loops tie to each other."""
    layers = model.arch.num_layers
    kept = [1 + layers % 2, 1 + layers % 2 + layers // 2]
    return {"mixers": [{"type": "gated_deltanet", "transfer": "all", "except": kept}]}


def both(model: SourceModel, seed: int) -> dict[str, Any]:
    """Makes the recipe of the recursive hybrid."""
    return {**recursive(model), **hybrid(model)}


def shrunk(part: Callable[[SourceModel], dict[str, Any]]) -> RecipeMaker:
    """Returns a maker of recipes that drop layers of one part until its weights and cache are nearest to those of both.

    Layers are dropped evenly, as many as brings the memory nearest.
    """

    def make(model: SourceModel, seed: int) -> dict[str, Any]:
        wanted = _memory(model, both(model, seed))
        found: dict[int, dict[str, Any]] = {}
        for count in range(model.arch.num_layers - 1):
            drop = {"drop": {"block": {"count": count, "by": "even"}}} if count else {}
            recipe = {**part(model), **drop}
            # Two loops may not divide the kept layers, or a kept mixer may be dropped.
            with contextlib.suppress(RecipeError):
                found.setdefault(abs(_memory(model, recipe) - wanted), recipe)
        if not found:
            raise RecipeError("drop.block: a recipe that fits the source is required (got none for any count)")
        return found[min(found)]

    return make


def _memory(model: SourceModel, recipe: dict[str, Any]) -> int:
    return plan_model(model, load_recipe(recipe), allow_larger=True).cost.target.memory_bytes(MEMORY_TOKENS)


RECURSIVE_HYBRID = ClaimArm("recursive hybrid", both, heal=DISTIL)
RECURSIVE = ClaimArm("recursive, pruned to its memory", shrunk(recursive), heal=DISTIL)
HYBRID = ClaimArm("hybrid, pruned to its memory", shrunk(hybrid), heal=DISTIL)
TOGETHER = Claim(
    name="beyond-recursive-hybrid",
    paper=OURS,
    statement="Recursion and linear mixers together lose less than either alone at the same bytes, cache included.",
    figures="none: no paper converts a dense model into a recursive hybrid",
    measurements=(better(RECURSIVE_HYBRID, RECURSIVE), better(RECURSIVE_HYBRID, HYBRID)),
    note="Memory is that of one sequence of 8,192 tokens; a part alone is pruned evenly to the nearest.",
)

FOLDS = (
    ClaimArm("strict, Stepwise, unhealed", fold("stepwise")),
    ClaimArm("relaxed 30%, Average + SVD, unhealed", relaxed("average", "svd", LARGEST)),
    ClaimArm("joint start", "joint"),
    ClaimArm("tied where it pays (compact)", "compact"),
)


def low_rank_in_int4(model: SourceModel, seed: int) -> Recipe:
    """Makes the recipe of the two best rivals together."""
    return load_recipe("lowrank", ["quantise.to=int4"])


LOW_RANK = ClaimArm("measured low rank", "lowrank")
RIVALS = (
    ClaimArm("int8", {"quantise": {"to": "int8"}}),
    ClaimArm("int4", {"quantise": {"to": "int4"}}),
    LOW_RANK,
    ClaimArm("a third of the layers pruned by influence", {"drop": {"block": {"share": 1 / 3, "by": "similarity"}}}),
    ClaimArm("measured low rank in int4", low_rank_in_int4),
)
AGAINST_RIVALS = Claim(
    name="beyond-rivals",
    paper=OURS,
    statement="Folds lose less than their rivals in bytes: int8, int4, measured low rank, pruning, and the two best "
    "together.",
    figures="none: Relaxed Recursive Transformers compares with pruning once (table F.3) and with no other rival",
    measurements=tuple(better(each, rival) for each in FOLDS for rival in RIVALS),
    note="Without training. The rivals have fewer bytes than most folds; the table of models lists them. If the source "
    "was stored in 4 bits before, int4 is nearly exact for it.",
)
CLAIMS = (TOGETHER, AGAINST_RIVALS)
