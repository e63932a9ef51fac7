"""The scheme of each weight, by the section `quantise` of a recipe."""

from refold.blueprint.kinds import TargetTensor
from refold.blueprint.quantisation import is_quantised
from refold.blueprint.schema import POOLS, Blueprint
from refold.blueprint.tensors import float_tensors
from refold.errors import RecipeError
from refold.planning.layer_lists import first_layer, require_layer_lists
from refold.recipe.quantise import FLOAT, OUTER_SCHEME, Quantise
from refold.suggest import did_you_mean

OUTER = {"embedding": "embeddings", "head": "head"}
"""Names of the places of outer tensors in the recipe."""


def choose_schemes(blueprint: Blueprint, section: Quantise) -> dict[str, str]:
    """Returns the scheme of each weight that is stored as integers, by the name of its tensor.

    Args:
        blueprint: The model, its weights as floats.
        section: The recipe's `quantise`.

    Raises:
        RecipeError: `keep` or `layers` names no linear of the model, a list has another length than the source has
            layers, or nothing is left to quantise.
    """
    tensors = [each for each in float_tensors(blueprint) if each.kind.place in OUTER or is_quantised(blueprint, each)]
    legal = dict.fromkeys((*OUTER.values(), *POOLS, *(each.linear for each in tensors if each.pool is not None)))
    for name in section.keep:
        if name not in legal:
            raise RecipeError(
                f"quantise.keep.{name}: must name embeddings, head, a pool or a stored linear: "
                f"{', '.join(legal)}{did_you_mean(name, legal)}"
            )
    if "head" in section.keep and blueprint.arch.tied_head:
        raise RecipeError(
            "quantise.keep.head: an untied head is required (this model's head is its embedding); use embeddings"
        )
    require_layer_lists("quantise.layers", section.layers, blueprint)
    chosen = {each.name: _format(blueprint, each, section) for each in tensors}
    found = {name: scheme for name, scheme in chosen.items() if scheme != FLOAT}
    if not found:
        raise RecipeError("quantise.keep: a weight to quantise is required (all are kept as float); remove some")
    return found


def _format(blueprint: Blueprint, tensor: TargetTensor, section: Quantise) -> str:
    if tensor.pool is None:
        return section.keep.get(OUTER[tensor.kind.place]) or OUTER_SCHEME
    if tensor.linear in section.layers:
        if tensor.depth is not None:
            layer = blueprint.depths[tensor.depth].source
        else:
            assert tensor.part is not None
            layer = first_layer(blueprint, tensor.pool, tensor.part)
        return section.layers[tensor.linear][layer]
    return section.keep.get(tensor.linear) or section.keep.get(tensor.pool) or section.to
