"""Which depths have a prefix, from the recipe's `relax`: every check across recipe and stack."""

from refold.blueprint.recipe import LoraRelax, PrefixRelax
from refold.blueprint.schema import Blueprint
from refold.blueprint.specs.registry import find_mixer
from refold.errors import RecipeError


def with_prefixes(blueprint: Blueprint, relax: LoraRelax | PrefixRelax | None) -> Blueprint:
    """Returns the stack with a prefix at each depth that gets one; depths without a mixer get none.

    Raises:
        RecipeError: No depth gets one, or one would that makes no keys and values, because its mixer has none or it
            reads those of another depth.
    """
    if not isinstance(relax, PrefixRelax):
        return blueprint
    places = tuple(
        index
        for index, depth in enumerate(blueprint.depths)
        if depth.mixer is not None and (relax.at == "all" or len(blueprint.users("mixer", depth.mixer)) > 1)
    )
    if not places:
        raise RecipeError(
            "relax: tied attention is required for prefixes (no stored attention is used twice); set fold.loops to 2 "
            "or more with mixer in fold.tie, or relax.at to all"
        )
    for index in places:
        depth = blueprint.depths[index]
        assert depth.mixer is not None
        mixer = blueprint.mixers[depth.mixer].type
        if not find_mixer(mixer).key_value_names:
            raise RecipeError(
                f"relax.type: softmax attention is required for prefixes (depth {index} has {mixer}, whose state takes "
                f"no extra keys); use lora, or leave mixers out"
            )
        if not blueprint.made_heads(index):
            raise RecipeError(
                f"relax.type: keys and values of its own are required for a prefix (depth {index} reads those of depth "
                f"{depth.kv[0].depth}); use lora, or leave share_kv out"
            )
    depths = tuple(
        depth.model_copy(update={"prefix": relax.length}) if index in places else depth
        for index, depth in enumerate(blueprint.depths)
    )
    return blueprint.model_copy(update={"depths": depths})


def describe_prefixes(blueprint: Blueprint) -> tuple[str, ...]:
    """Returns a line on what the prefixes do before they are trained."""
    lengths = [depth.prefix for depth in blueprint.depths if depth.prefix]
    if not lengths:
        return ()
    parameters = sum(lengths) * blueprint.arch.hidden_size
    return (
        f"relax: {len(lengths)} depths have prefixes of {lengths[0]} vectors ({parameters:,} parameters); untrained "
        f"ones are noise that takes some attention away from tokens",
    )
