"""Lines that go with a plan: what was measured for the pairs of inits that a recipe chose."""

from refold.blueprint.recipe import Recipe

_SETTING = "Gemma 2B, two loops, 15B tokens, few-shot accuracy in the paper"
_STRICT = {"average": 46.7, "lower": 47.1, "random": 37.6}
_RELAXED = {("stepwise", "svd"): 50.5, ("average", "zero"): 49.0, ("lower", "svd"): 53.2, ("lower", "zero"): 49.5}


def advise(recipe: Recipe, relaxed: bool) -> tuple[str, ...]:
    """Returns lines on choices that were measured to be worse than another.

    Args:
        recipe: The recipe, with its defaults resolved.
        relaxed: Whether any LoRA is there.
    """
    fold, relax = recipe.fold, recipe.lora
    if fold is None or fold.loops == 1 or recipe.weights == "fresh" or recipe.shares_bases:
        return ()
    init = fold.init if isinstance(fold.init, str) else ""
    if not relaxed or relax is None:
        if init in _STRICT:
            return (f"fold.init: {init} without LoRAs had {_STRICT[init]}, stepwise 51.7 ({_SETTING})",)
        return ()
    measured = _RELAXED.get((init, relax.init or ""))
    if measured is None:
        return ()
    better = "stepwise + zero 53.1, average + svd 55.5" if init == "stepwise" else "average + svd 55.5"
    return (f"fold.init, relax.init: {init} + {relax.init} had {measured} at rank 512, {better} ({_SETTING})",)
