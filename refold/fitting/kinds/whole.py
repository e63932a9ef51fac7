"""The whole part, as it is in the source."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from refold.blueprint.schema import POOLS, MixerPart, Pool
from refold.families.arch import ArchSpec
from refold.fitting.form_costs import part_costs
from refold.fitting.kinds.kind import MeasuredPart, PartKind
from refold.fitting.menu import Costs, MenuMatrix, PartForm
from refold.mixers.spec import MLP


class WholePart(PartKind):
    """Keeps the part; only its matrices may change."""

    name = "whole"
    pools = POOLS

    def forms(self, part: MeasuredPart, whole: Sequence[MenuMatrix]) -> Iterator[PartForm]:
        costs = whole_costs(part.arch, part.layer, part.pool, part.context)
        yield PartForm(kind=self.name, loss=0.0, costs=costs, matrices=tuple(whole))

    def write(self, recipe: dict[str, Any], arch: ArchSpec, chosen: Mapping[int, PartForm], pool: Pool) -> None:
        """Writes nothing: a part that a recipe does not name is kept."""


def whole_costs(arch: ArchSpec, layer: int, pool: Pool, context: int) -> Costs:
    """Returns the costs of a whole part beside those of its matrices.

    Args:
        arch: The source, or the source with the sizes of a narrower part.
        layer: Index of the layer.
        pool: Pool of the part.
        context: Tokens at which cache and FLOPs are counted.
    """
    spec = MLP if pool == "mlp" else MixerPart().mixer
    return part_costs(spec, arch, arch.layers[layer].window, context)
