"""A part that is dropped, with its norms."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from refold.blueprint.schema import POOLS, Pool
from refold.families.arch import ArchSpec
from refold.fitting.kinds.kind import MeasuredPart, PartKind
from refold.fitting.menu import Costs, MenuMatrix, PartForm

SECTIONS: Mapping[Pool, str] = {"mixer": "attention", "mlp": "mlp"}
"""The key of each pool in a recipe's `drop`."""


class DroppedPart(PartKind):
    """Drops the part. Its loss is E[(g . u)^2] / 2 over all tokens of the text, with u the update that is missing."""

    name = "drop"
    pools = POOLS

    def forms(self, part: MeasuredPart, whole: Sequence[MenuMatrix]) -> Iterator[PartForm]:
        yield PartForm(kind=self.name, loss=part.extras[self.name], costs=Costs())

    def write(self, recipe: dict[str, Any], arch: ArchSpec, chosen: Mapping[int, PartForm], pool: Pool) -> None:
        add_dropped(recipe, chosen, pool)


def add_dropped(recipe: dict[str, Any], layers: Mapping[int, PartForm], pool: Pool) -> dict[str, Any]:
    """Adds the parts of layers to a recipe's `drop`, and returns the section of their pool."""
    section = recipe.setdefault("drop", {}).setdefault(SECTIONS[pool], {"layers": []})
    section["layers"] = sorted({*section["layers"], *layers})
    return section
