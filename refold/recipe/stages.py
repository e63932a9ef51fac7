"""The choice of healing stages from a protocol or a recipe, a token budget, and overrides."""

from collections.abc import Mapping, Sequence
from typing import Any

from refold.errors import RecipeError
from refold.recipe.heal import HealStage, scale_stages
from refold.recipe.load import RecipeLike, load_recipe

DEFAULT_PROTOCOL = "distil"


def choose_stages(
    *,
    protocol: str | None = None,
    recipe: RecipeLike = None,
    tokens: int | None = None,
    changes: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> tuple[HealStage, ...]:
    """Returns the stages to train.

    Args:
        protocol: A built-in protocol. Default without a recipe: `distil`.
        recipe: A recipe whose `heal` section is used instead of a protocol.
        tokens: Token budget of all stages; None: the recipe's own.
        changes: Keys that override those of every stage.
        overrides: `key.path=value` strings, such as `heal.warmup=0.1`.

    Raises:
        RecipeError: Both protocol and recipe are given, the budget is missing, or a value is invalid.
    """
    if recipe is None:
        if tokens is None:
            raise RecipeError("tokens: a budget is required, such as 20M (got none)")
        section = {"protocol": protocol or DEFAULT_PROTOCOL, "tokens": tokens, **(changes or {})}
        return load_recipe({"heal": section}, overrides).heal
    if protocol is not None:
        raise RecipeError(f"protocol: either a protocol or a recipe is required (got {protocol} and {recipe})")
    loaded = load_recipe(recipe, overrides)
    if not loaded.heal:
        raise RecipeError(f"recipe {recipe}: a `heal` section is required (got none)")
    stages = loaded.heal if tokens is None else tuple(scale_stages(loaded.heal, tokens))
    dumped = [stage.model_dump(exclude_unset=True) for stage in stages]
    return load_recipe({"heal": [{**stage, **(changes or {})} for stage in dumped]}).heal
