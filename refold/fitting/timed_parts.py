"""Milliseconds of the parts of a menu beside their matrices, from a device's table."""

from refold.families.arch import ArchSpec
from refold.fitting.device_table import DeviceTable
from refold.fitting.menu import Menu, PartForm, PartMenu, TieForm

ATTENTION, MLP = "attention", "mlp"


def timed_parts(menu: Menu, table: DeviceTable, arch: ArchSpec, batch: int = 1) -> Menu:
    """Returns a menu with the milliseconds of norms, attention, activations and steps beside those of matrices.

    Call it once, on a menu whose matrices have their times: times of parts are replaced, those of a step are added to
    the fixed costs, and both to the source.

    Args:
        menu: A menu of the source.
        table: Times of the device.
        arch: The source.
        batch: Tokens decoded at once.

    Raises:
        RefoldError: The table lacks the times of a mixer, or of the batch.
    """
    times = _PartTimes(table, arch, menu.context, batch)
    parts = tuple(
        part.model_copy(update={"forms": tuple(_with_time(form, times.of(part, form)) for form in part.forms)})
        for part in menu.parts
    )
    ties = tuple(
        tie.model_copy(update={"costs": tie.costs._replace(milliseconds=times.of_tie(tie))}) for tie in menu.ties
    )
    step = table.step_ms(batch)
    whole = step + sum(part.forms[0].costs.milliseconds for part in parts)
    return menu.model_copy(
        update={
            "parts": parts,
            "ties": ties,
            "fixed": menu.fixed._replace(milliseconds=menu.fixed.milliseconds + step),
            "source": menu.source._replace(milliseconds=menu.source.milliseconds + whole),
        }
    )


class _PartTimes:
    """The times of the forms of parts."""

    def __init__(self, table: DeviceTable, arch: ArchSpec, context: int, batch: int):
        self._table, self._arch, self._context, self._batch = table, arch, context, batch

    def of(self, part: PartMenu, form: PartForm) -> float:
        """Returns the milliseconds of one form beside its matrices; 0 for a part that left the model."""
        if form.leaves:
            return 0.0
        if part.pool == "mlp":
            return self._ms(MLP, 0, 0)
        kind = str(form.setting.get("type", ATTENTION))
        groups = int(form.setting.get("groups", self._arch.num_key_value_heads))
        size = self._arch.head_dim * self._arch.num_attention_heads * groups // self._arch.num_key_value_heads
        window = int(form.setting.get("window", 0))
        if kind == ATTENTION:
            return self._ms(kind, size, self._reached(part.layer, window))
        return self._ms(kind, size, window)

    def of_tie(self, tie: TieForm) -> float:
        """Returns the milliseconds of both layers of a tie."""
        if tie.pool == "mlp":
            return 2 * self._ms(MLP, 0, 0)
        size = self._arch.head_dim * self._arch.num_attention_heads
        return sum(self._ms(ATTENTION, size, self._reached(layer, 0)) for layer in tie.layers)

    def _reached(self, layer: int, window: int) -> int:
        windows = [each for each in (window, self._arch.layers[layer].window) if each]
        return min((self._context, *windows))

    def _ms(self, kind: str, size: int, context: int) -> float:
        return self._table.part_ms(kind, self._arch.hidden_size, size, context, self._batch)


def _with_time(form: PartForm, milliseconds: float) -> PartForm:
    return form.model_copy(update={"costs": form.costs._replace(milliseconds=milliseconds)})
