"""Initialisations of tied layers: the source layers that each stored layer is computed from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


def evenly_spaced(num_layers: int, num_kept: int) -> tuple[int, ...]:
    """Returns `round(linspace(0, L-1, P))`, rounded half to even: first and last layer are always kept.

    The arithmetic is the same as in NumPy (one float step, an exact last point), so the result equals
    `numpy.round(numpy.linspace(0, L - 1, P))` for every L and P.

    Args:
        num_layers: L.
        num_kept: P, from 0 to L.
    """
    if num_kept < 2:
        return (0,)[:num_kept]
    step = (num_layers - 1) / (num_kept - 1)
    return (*(round(index * step) for index in range(num_kept - 1)), num_layers - 1)


Sources = tuple[tuple[int, ...], ...]
"""For each stored layer the source layers whose mean it is initialised with; empty: fresh weights."""

RRT_URL = "https://arxiv.org/abs/2410.20672"


@dataclass(frozen=True)
class TiedBlock:
    """The tied layers of a stack.

    Attributes:
        layers: The source layers of the block, in their order.
        groups: For each stored layer, in the order of the first loop, the source layers tied to it.
    """

    layers: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TyingInit:
    """An initialisation of the stored layers of a tied block."""

    name: str
    url: str
    summary: str
    sources: Callable[[TiedBlock], Sources]


def _stepwise(block: TiedBlock) -> Sources:
    picks = evenly_spaced(len(block.layers), len(block.groups))
    return tuple((block.layers[pick],) for pick in picks)


def _average(block: TiedBlock) -> Sources:
    return block.groups


def _lower(block: TiedBlock) -> Sources:
    return tuple((layer,) for layer in block.layers[: len(block.groups)])


def _upper(block: TiedBlock) -> Sources:
    return tuple((layer,) for layer in block.layers[len(block.layers) - len(block.groups) :])


def _random(block: TiedBlock) -> Sources:
    return ((),) * len(block.groups)


TYING_INITS: Mapping[str, TyingInit] = {
    init.name: init
    for init in (
        TyingInit("stepwise", RRT_URL, "evenly spaced layers, first and last included", _stepwise),
        TyingInit("average", RRT_URL, "the mean of the layers tied to it", _average),
        TyingInit("lower", RRT_URL, "the first layers of the block", _lower),
        TyingInit("upper", RRT_URL, "the last layers of the block", _upper),
        TyingInit("random", RRT_URL, "fresh weights: the paper's floor", _random),
    )
}


def explicit(layers: tuple[int, ...]) -> TyingInit:
    """Returns the initialisation with one given source layer for each stored layer."""
    return TyingInit("explicit", RRT_URL, "named layers", lambda block: tuple((layer,) for layer in layers))
