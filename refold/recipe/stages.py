"""The choice of healing stages from a protocol or a recipe, a token budget, and overrides."""

from collections.abc import Sequence

from refold.errors import RecipeError
from refold.recipe.heal import HealStage, scale_stages
from refold.recipe.load import RecipeLike, load_recipe

DEFAULT_PROTOCOL = "distil"


def choose_stages(
    *,
    protocol: str | None = None,
    recipe: RecipeLike = None,
    tokens: int | None = None,
    overrides: Sequence[str] = (),
) -> tuple[HealStage, ...]:
    """Returns the stages to train.

    Args:
        protocol: A built-in protocol. Default without a recipe: `distil`.
        recipe: A recipe whose `heal` section is used instead of a protocol.
        tokens: Token budget of all stages together; None: the recipe's own.
        overrides: `key.path=value` strings; `heal.warmup=0.1` sets every stage, `heal.0.warmup=0.1` only one.

    Raises:
        RecipeError: Both protocol and recipe are given, the budget is missing, or a value is invalid.
    """
    if recipe is None:
        if tokens is None:
            raise RecipeError("tokens: a budget is required (got none); pass --tokens, such as 20M")
        section = {"protocol": protocol or DEFAULT_PROTOCOL, "tokens": tokens}
        return load_recipe({"heal": section}, overrides).heal
    if protocol is not None:
        raise RecipeError(
            f"protocol: either a protocol or a recipe is required (got {protocol} and {recipe}); remove one of them"
        )
    loaded = load_recipe(recipe, overrides)
    if not loaded.heal:
        raise RecipeError(f"recipe {recipe}: a `heal` section is required (got none); name a --protocol instead")
    return loaded.heal if tokens is None else tuple(scale_stages(loaded.heal, tokens))
