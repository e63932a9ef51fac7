"""The table of all mixers, by the `type` that recipes and blueprints use."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Discriminator, Tag

from refold.errors import RecipeError
from refold.mixers.attention import Attention
from refold.mixers.gated_deltanet import GatedDeltanet
from refold.mixers.gla import Gla
from refold.mixers.linear_attention import LinearAttention
from refold.mixers.mamba import Mamba
from refold.mixers.mamba2 import Mamba2
from refold.mixers.retention import Retention
from refold.mixers.spec import MixerSpec
from refold.suggest import must_be_one_of

MIXERS: Mapping[str, type[MixerSpec]] = {
    mixer.model_fields["type"].default: mixer
    for mixer in (
        Attention,
        Retention,
        Mamba,
        Mamba2,
        Gla,
        GatedDeltanet,
        LinearAttention,
    )
}
"""All mixers by `type`. Unions, the recipe reference and error messages are derived from this table."""


def tagged_union(classes: Mapping[str, type[MixerSpec]]) -> Any:
    """Returns a union of mixer classes whose branch is chosen by the key `type`.

    Args:
        classes: Classes by `type`: `MIXERS`, or classes made from it.
    """
    # Error messages drop tags in angle brackets, which only name the branch of a union.
    branches = tuple(Annotated[each, Tag(f"<{name}>")] for name, each in classes.items())
    return Annotated[Union[branches], Discriminator(_tag), BeforeValidator(_known_mixer)]  # noqa: UP007


def require_module(mixer: MixerSpec) -> None:
    """Checks, without importing torch, that the file with a mixer's module exists.

    Raises:
        RecipeError: There is no such file, so a folder with this mixer could not run.
    """
    if find_spec(f"refold.nn.mixers.{mixer.type}") is None:
        raise RecipeError(
            f"mixers: {mixer.type}: a module is required (there is no refold/nn/mixers/{mixer.type}.py); write it and "
            f"enter it in refold/nn/mixers/registry.py"
        )


def _known_mixer(value: Any) -> Any:
    if isinstance(value, MixerSpec):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping (got {value!r})")
    kind = value.get("type", "")
    if not isinstance(kind, str) or kind not in MIXERS:
        raise ValueError(f"type: {must_be_one_of(kind, MIXERS)}")
    return value


def _tag(value: Any) -> str:
    return f"<{value['type'] if isinstance(value, Mapping) else value.type}>"


if TYPE_CHECKING:
    AnyMixer = MixerSpec
else:
    AnyMixer = tagged_union(MIXERS)
