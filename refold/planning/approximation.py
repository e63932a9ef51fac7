"""Feature maps that approximate the source's softmax attention, and the error of the approximation."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from refold.blueprint.origins import Initialisation, carried_tensor
from refold.blueprint.schema import Blueprint
from refold.errors import RecipeError
from refold.families.arch import Frozen
from refold.mixers.spec import MixerSpec, SoftmaxFit

LEARNED = ("q_map.weight", "k_map.weight")
"""The vectors of a mixer that are fitted."""


class Approximation(Frozen):
    """Distance between a depth's attention weights and those of its source layer, right after conversion.

    Distances are total variation, 1/2 sum |p - q|: the share of its attention that a token gives to wrong tokens. Gaps
    are cross-entropy minus entropy, the Kullback-Leibler divergence of q from p, in nats. Both are means over heads and
    tokens of held-out sequences. The rows of a mixer that does not normalise are divided by their sums.
    """

    start: float
    """Distance with the initial map, before any fit."""
    fitted: float | None = None
    """Distance with the fitted map that is stored; None: the map was not fitted."""
    start_gap: float
    fitted_gap: float | None = None
    inputs: Literal["text", "random"]
    """Inputs of the measurement: calibration text, or hidden states drawn from a normal distribution."""
    tokens: int
    """Number of measured tokens."""


@dataclass(frozen=True)
class StoredMap:
    """The feature maps of one stored mixer, or the own feature maps of a depth.

    Attributes:
        prefix: Prefix of the names of their tensors, such as `model.mixers.0.`.
        mixer: The mixer.
        depths: The depths that run these maps, in their order.
        layers: The source layers of these depths, without repetition.
        names: Names of the vectors, such as `q_map.weight`, including those that blend in a window.
    """

    prefix: str
    mixer: MixerSpec
    depths: tuple[int, ...]
    layers: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def fit(self) -> SoftmaxFit:
        assert self.mixer.softmax_fit is not None
        return self.mixer.softmax_fit


def stored_maps(blueprint: Blueprint, starts: Initialisation) -> tuple[StoredMap, ...]:
    """Returns the feature maps of all mixers that take over queries and keys from their source.

    Raises:
        RecipeError: A map has to be fitted, but its queries or keys are fresh.
    """
    users: dict[str, list[int]] = {}
    for index, depth in enumerate(blueprint.depths):
        if depth.mixer is None or starts.weights == "fresh":
            continue
        fit = blueprint.mixers[depth.mixer].mixer.softmax_fit
        if fit is None:
            continue
        if not _takes_over(blueprint, starts, depth.mixer):
            if fit != "none":
                raise RecipeError(
                    f"mixers: fit: the source's queries and keys are required at depth {index} (got fresh ones); "
                    f"add q_proj and k_proj to transfer, or remove `fit: {fit}`"
                )
            continue
        owns = depth.vectors == "own"
        prefix = f"model.depths.{index}.vectors.mixer." if owns else f"model.mixers.{depth.mixer}."
        users.setdefault(prefix, []).append(index)
    return tuple(_describe(blueprint, prefix, tuple(depths)) for prefix, depths in users.items())


def require_text(maps: Iterable[StoredMap], has_text: bool) -> None:
    """Checks that calibration text is given if a map has to be fitted on it.

    Raises:
        RecipeError: No text is given.
    """
    first = next((stored for stored in maps if stored.fit == "calibration"), None)
    if first is not None and not has_text:
        raise RecipeError(
            f"mixers: fit: text is required for `fit: calibration` at depth {first.depths[0]} (got none); give "
            f"--calibration FILE (in Python: calibration=[FILE]), or set fit to data_free"
        )


def _takes_over(blueprint: Blueprint, starts: Initialisation, part: int) -> bool:
    names = ("q_proj.weight", "k_proj.weight")
    carried = all(carried_tensor(blueprint, starts, part, name) is not None for name in names)
    return carried and bool(blueprint.mixers[part].sources)


def _describe(blueprint: Blueprint, prefix: str, depths: tuple[int, ...]) -> StoredMap:
    index = blueprint.depths[depths[0]].mixer
    assert index is not None
    mixer = blueprint.mixers[index].mixer
    layers = tuple(dict.fromkeys(blueprint.depths[depth].source for depth in depths))
    names = tuple(mixer.fills(blueprint.arch))
    return StoredMap(prefix, mixer, depths, layers, names)
