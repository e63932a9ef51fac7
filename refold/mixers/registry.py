"""All mixers, by the name a blueprint uses for them."""

from collections.abc import Mapping

from refold.errors import RecipeError
from refold.mixers import attention, gated_deltanet, gla, linear_attention, mamba, mamba2, mlp, retention
from refold.mixers.spec import PartSpec
from refold.suggest import must_be_one_of

MIXERS: Mapping[str, PartSpec] = {
    spec.name: spec
    for spec in (
        attention.SPEC,
        retention.SPEC,
        mamba.SPEC,
        mamba2.SPEC,
        gla.SPEC,
        gated_deltanet.SPEC,
        linear_attention.SPEC,
    )
}
MLP = mlp.SPEC


def find_mixer(name: str) -> PartSpec:
    """Returns a mixer's spec.

    Raises:
        RecipeError: No mixer of that name.
    """
    if name not in MIXERS:
        raise RecipeError(f"mixers: type: {must_be_one_of(name, MIXERS)}")
    return MIXERS[name]
