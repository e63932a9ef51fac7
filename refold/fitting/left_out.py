"""Measured losses of parts that leave the model: alone, and together with the part that follows."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from refold.calibration.layers import SourceLayers
from refold.calibration.leave_out import measure_left_out
from refold.data.packing import PackedSequence
from refold.fitting.menu import FitChoice, Menu, PartForm, PartMenu, PartPair
from refold.planning.replacements import PartPlace

MOST_PARTS = 12
"""Parts whose leaving is measured at a time."""
LEAST_LOSS = 1e-5
"""Nats below which a loss is noise: losses of parts that leave are kept above it."""


def leaving_parts(choices: Sequence[FitChoice]) -> list[PartPlace]:
    """Returns the parts that leave the model in some choices, those of most choices first, at most `MOST_PARTS`."""
    parts = (part for choice in choices for part in choice.parts if part.form.leaves)
    counted: Counter[PartPlace] = Counter((part.layer, part.pool) for part in parts)
    return [place for place, _ in counted.most_common(MOST_PARTS)]


def measure_leaving(
    menu: Menu,
    places: Sequence[PartPlace],
    layers: SourceLayers,
    packed: PackedSequence,
    scratch: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> Menu:
    """Returns a menu whose losses of some leaving parts are measured, with pairs where two of them follow each other.

    The estimate of a menu is of second order, and a part that leaves is no small change. The loss of a part that a
    linear map replaces changes by the same factor as that of the part that is dropped.

    Args:
        menu: The menu.
        places: Layer and pool of the parts.
        layers: Layers of the source.
        packed: Held-out tokens.
        scratch: An existing folder for residual streams.
        progress: Called with the number of layers that have run.
    """
    order: list[PartPlace] = [(part.layer, part.pool) for part in menu.parts]
    wanted = sorted(places, key=order.index)
    following = [(one, two) for one, two in pairwise(order) if one in wanted and two in wanted]
    sets: list[list[PartPlace]] = [[place] for place in wanted] + [list(pair) for pair in following]
    found = measure_left_out(layers, packed, sets, scratch, progress=progress)
    alone = {place: max(loss, LEAST_LOSS) for place, loss in zip(wanted, found.increases, strict=False)}
    together = zip(following, found.increases[len(wanted) :], strict=True)
    pairs = [
        PartPair(first=one, second=two, loss=max(0.0, loss - alone[one] - alone[two])) for (one, two), loss in together
    ]
    parts = tuple(_measured(part, alone.get((part.layer, part.pool))) for part in menu.parts)
    known = {(pair.first, pair.second) for pair in pairs}
    kept = [pair for pair in menu.pairs if (pair.first, pair.second) not in known]
    return menu.model_copy(update={"parts": parts, "pairs": (*kept, *pairs)})


def _measured(part: PartMenu, loss: float | None) -> PartMenu:
    dropped = next((form.loss for form in part.forms if form.leaves and form.kind == "drop"), None)
    if loss is None or dropped is None:
        return part
    factor = loss / max(dropped, LEAST_LOSS)

    def corrected(form: PartForm) -> PartForm:
        changed = loss if form.kind == "drop" else form.loss * factor
        return form.model_copy(update={"loss": changed}) if form.leaves else form

    return part.model_copy(update={"forms": tuple(corrected(form) for form in part.forms)})
