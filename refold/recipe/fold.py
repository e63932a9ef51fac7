"""The `fold` section of a recipe: layers that are tied, as a block that runs several times or as listed groups."""

import itertools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from refold.blueprint.origins import Align
from refold.blueprint.schema import Pool
from refold.fields import Count, LayerIndex, Section, refuse_repeats
from refold.recipe.tying import TYING_INITS
from refold.suggest import did_you_mean, shorten


def _known_init(name: str) -> str:
    if name not in TYING_INITS:
        raise ValueError(
            f"must be one of {', '.join(TYING_INITS)} or a list of source layers (got {shorten(name)})"
            f"{did_you_mean(name, TYING_INITS)}"
        )
    return name


# Error messages drop tags in angle brackets, which only name the branch of a union.
def list_or_name(value: Any) -> str:
    """Returns the tag of a value that is a list or a name."""
    return "<list>" if isinstance(value, (list, tuple)) else "<name>"


ListedInit = Annotated[tuple[LayerIndex, ...], Field(min_length=1)]
FoldInit = Annotated[
    Annotated[str, AfterValidator(_known_init), Tag("<name>")] | Annotated[ListedInit, Tag("<list>")],
    Discriminator(list_or_name),
]
TiedPools = Annotated[tuple[Pool, ...], Field(min_length=1), AfterValidator(refuse_repeats)]
BLOCK_KEYS = ("pattern", "tie", "prelude", "coda", "uneven")
"""Keys that describe a block that runs several times, and stand only beside `loops`."""


def _increasing(layers: tuple[int, ...]) -> tuple[int, ...]:
    if any(later <= earlier for earlier, later in itertools.pairwise(layers)):
        raise ValueError(f"must be in the order of the stack, each layer once (got {list(layers)})")
    return layers


class TiedGroup(Section):
    """Layers that run one stored part."""

    layers: Annotated[tuple[LayerIndex, ...], Field(min_length=2), AfterValidator(_increasing)]
    """Two or more source layers, in the order of the stack."""
    tie: TiedPools = ("mixer", "mlp")
    """Parts that are tied."""


class Fold(Section):
    """Ties layers: a block that runs several times, or listed groups."""

    loops: Count | None = None
    """Number of times that the block runs. Exactly one of `loops` and `groups` is required."""
    groups: tuple[TiedGroup, ...] | None = None
    """Listed ties instead of a block, such as `[{layers: [3, 4], tie: [mlp]}]`; all other parts stay untied. Groups
    that tie the same part have no layer in common. `init` then applies to each group alone: `stepwise` and `lower` take
    its first layer, `upper` its last, `average` their mean."""
    pattern: Literal["cycle", "sequence", "cycle_reversed"] = "cycle"
    """Order in which the K stored layers run: 1..K again and again (`cycle`); each one `loops` times in a row
    (`sequence`); or forwards in even and backwards in odd loops, counted from 0 (`cycle_reversed`)."""
    init: FoldInit | None = None
    """Initialisation of the stored layers: `stepwise`, `average`, `lower`, `upper`, `random`, or a list with one source
    layer for each stored layer of the block. Default: `average` if `relax.init` is `svd` or `joint`, else
    `stepwise`."""
    tie: TiedPools = ("mixer", "mlp")
    """Parts that are tied. A part that is not in the list stays untied: one stored part for each layer."""
    align: Align = "none"
    """Alignment of layers before they are averaged, so that similar weights meet: `permutation` reorders MLP neurons
    and attention heads, `rotation` rotates the values of each head, `both` does both. Alignment does not change the
    outputs of a layer. It requires `init: average`."""
    scale: Literal["none", "norm"] = "none"
    """`norm`: the mean of tied linears is scaled to the mean of their Frobenius norms, because averaging different
    matrices shrinks the norm. It requires `init: average`, and no LoRAs or LoRAs with `init: zero`."""
    prelude: LayerIndex = 0
    """Number of untied layers kept before the block."""
    coda: LayerIndex = 0
    """Number of untied layers kept after the block."""
    uneven: Literal["error", "drop", "prelude"] = "error"
    """Handling of a block whose number of layers is not a multiple of `loops`: an error (`error`), dropping the surplus
    layers, evenly spaced (`drop`), or adding them to the prelude (`prelude`)."""

    @model_validator(mode="after")
    def _one_way(self) -> "Fold":
        given = [name for name in ("loops", "groups") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of loops, groups is required (got {', '.join(given) or 'none'})")
        if self.groups is None:
            return self
        if not self.groups:
            raise ValueError("groups: at least one group is required (got none); list one, or remove fold")
        for name in BLOCK_KEYS:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: cannot stand beside groups (got {getattr(self, name)!r}); remove it")
        if isinstance(self.init, tuple):
            raise ValueError(f"init: a name is required beside groups (got {list(self.init)}); remove init")
        for pool in ("mixer", "mlp"):
            tied = [layer for group in self.groups if pool in group.tie for layer in group.layers]
            twice = next((layer for layer in tied if tied.count(layer) > 1), None)
            if twice is not None:
                raise ValueError(f"groups: layer {twice} must occur once with {pool} (got two groups); join them")
        return self
