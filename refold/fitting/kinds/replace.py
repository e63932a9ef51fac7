"""A linear map in the place of a dropped part, folded into the projection before it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from refold.blueprint.schema import POOLS, Pool
from refold.calibration.replacement import predict_replacement
from refold.families.arch import ArchSpec
from refold.fitting.kinds.drop import add_dropped
from refold.fitting.kinds.kind import MeasuredPart, PartKind
from refold.fitting.menu import Costs, MenuMatrix, PartForm


class ReplacedPart(PartKind):
    """Drops the part and changes the projection before it to make up for it (ReplaceMe, arXiv 2505.02819).

    The form costs as little as a dropped part, so it is offered only where its loss is lower. Of the first part, and of
    families whose attention and MLP read one stream, nothing stands before the part.
    """

    name = "replace"
    pools = POOLS

    def forms(self, part: MeasuredPart, whole: Sequence[MenuMatrix]) -> Iterator[PartForm]:
        if part.before is None or part.arch.residual == "parallel":
            return
        found = predict_replacement(
            part.before.updates,
            part.sample.inputs,
            part.sample.updates,
            part.sample.gradients,
            part.sample.positions[:, 0],
            is_diagonal=part.arch.output_norms,
        )
        if 0 < found.replaced < found.dropped:
            # The ratio is that of the sample; the loss without a map is known from all of the text.
            loss = part.extras["drop"] * found.replaced / found.dropped
            yield PartForm(kind=self.name, loss=loss, costs=Costs(), needs="projection")

    def write(self, recipe: dict[str, Any], arch: ArchSpec, chosen: Mapping[int, PartForm], pool: Pool) -> None:
        """Writes the dropped layers of the pool, and which of them a map replaces: those of the forms alone."""
        if chosen:
            section = add_dropped(recipe, chosen, pool)
            section["replace"] = "linear" if section["layers"] == sorted(chosen) else sorted(chosen)
