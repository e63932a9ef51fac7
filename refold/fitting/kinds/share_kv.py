"""Attention that reads keys and values of the layer before."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from refold.blueprint.schema import MixerPart, Pool
from refold.families.arch import ArchSpec
from refold.fitting.form_costs import FLOAT_BYTES
from refold.fitting.kinds.kind import MeasuredPart, PartKind
from refold.fitting.kinds.whole import whole_costs
from refold.fitting.menu import MenuMatrix, PartForm


class BorrowedKeys(PartKind):
    """Reads all keys and values of the layer before, as Cross-Layer Attention does (arXiv 2405.12981).

    Only layers with an odd index do, so that no layer reads from one that reads itself and then computes its keys for
    nothing. Both layers have one window and one rotary embedding. The error of the update is measured on the sample,
    with the layer's own queries and the other layer's own keys.
    """

    name = "share_kv"
    pools = ("mixer",)

    def forms(self, part: MeasuredPart, whole: Sequence[MenuMatrix]) -> Iterator[PartForm]:
        if not can_share(part.arch, part.layer):
            return
        update = part.extras[self.name]()
        idle = MixerPart().mixer.key_value_names
        vectors = MixerPart().mixer.vectors(part.arch)
        costs = whole_costs(part.arch, part.layer, part.pool, part.context)
        unused = sum(shape[0] for name, shape in vectors.items() if name.split(".", 1)[0] in idle)
        yield PartForm(
            kind=self.name,
            setting={"from": part.layer - 1},
            loss=part.sample.loss_of(update - part.sample.updates),
            costs=costs._replace(bytes=costs.bytes - FLOAT_BYTES * unused, cache=0.0),
            matrices=tuple(matrix for matrix in whole if matrix.name not in idle),
            needs="keys",
        )

    def write(self, recipe: dict[str, Any], arch: ArchSpec, chosen: Mapping[int, PartForm], pool: Pool) -> None:
        entries = [{"depth": layer, "from": form.setting["from"]} for layer, form in sorted(chosen.items())]
        if entries:
            recipe["share_kv"] = [*recipe.get("share_kv", ()), *entries]


def can_share(arch: ArchSpec, layer: int) -> bool:
    """Says whether a layer may read keys and values of the layer before it."""
    return layer % 2 == 1 and arch.layers[layer] == arch.layers[layer - 1]
