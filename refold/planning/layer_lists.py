"""Lists of a recipe with one entry for each layer of the source."""

from collections.abc import Mapping, Sequence

from refold.blueprint.schema import POOLS, Blueprint, MixerPart, Pool, part_linears
from refold.errors import RecipeError
from refold.mixers.spec import MLP
from refold.suggest import did_you_mean


def require_each_layer(where: str, entries: Sequence, num_layers: int) -> None:
    """Checks that a list has one entry for each layer of the source.

    Args:
        where: Key of the list in the recipe.
        entries: The list.
        num_layers: Number of source layers.

    Raises:
        RecipeError: It has another length.
    """
    if len(entries) != num_layers:
        raise RecipeError(
            f"{where}: one entry for each of the source's {num_layers} layers is required (got {len(entries)}); "
            f"dropped layers have entries too"
        )


def first_layer(blueprint: Blueprint, pool: Pool, part: int) -> int:
    """Returns the source layer of the first depth that runs a stored part, whose entry in a list by layer it takes."""
    return blueprint.depths[blueprint.users(pool, part)[0]].source


def require_layer_lists(where: str, lists: Mapping[str, Sequence], blueprint: Blueprint) -> None:
    """Checks lists with one entry for each layer of the source, by linear.

    Args:
        where: Key of the lists in the recipe.
        lists: By the name of a linear.
        blueprint: The stack. Its linears are legal names, and those of its source, whose parts may all be dropped.

    Raises:
        RecipeError: A name is that of no linear, or a list has another length.
    """
    arch = blueprint.arch
    own = (*MixerPart(sources=(0,)).mixer.linears(arch), *MLP.linears(arch))
    stored = (
        name
        for pool in POOLS
        for index in range(len(blueprint.pool(pool)))
        for name in part_linears(blueprint, pool, index)
    )
    legal = dict.fromkeys((*own, *stored))
    for name, entries in lists.items():
        if name not in legal:
            raise RecipeError(f"{where}.{name}: must name a linear: {', '.join(legal)}{did_you_mean(name, legal)}")
        require_each_layer(f"{where}.{name}", entries, arch.num_layers)
