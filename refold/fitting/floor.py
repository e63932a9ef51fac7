"""The floor of a budget: the least that any choice from a menu needs, and its parts."""

from collections.abc import Collection
from typing import NamedTuple

from refold.errors import RefoldError
from refold.fitting.budget import Budget, format_quantity
from refold.fitting.choose import least_possible
from refold.fitting.menu import QUANTITIES, Menu

FIXED = "parts that no choice changes"
LAYERS = "layers in their smallest forms"


class Floor(NamedTuple):
    """The least possible amount of one quantity.

    Attributes:
        quantity: One of `QUANTITIES`.
        least: The least that a choice needs, whatever its loss.
        parts: Its parts by name: `embedding`, `head`, layers, and those that no choice changes; largest first.
    """

    quantity: str
    least: float
    parts: dict[str, float]

    def describe(self, source: float) -> str:
        """Returns the floor in words.

        Args:
            source: Amount of the source at two bytes a number.
        """
        told = ", ".join(f"{name} {format_quantity(self.quantity, amount)}" for name, amount in self.parts.items())
        share = f" ({self.least / source:.1%} of the source)" if source > 0 else ""
        return f"at least {format_quantity(self.quantity, self.least)}{share}: {told}"


def find_floor(menu: Menu, quantity: str = "bytes", without: Collection[str] = ()) -> Floor:
    """Finds the least possible amount of one quantity.

    Args:
        menu: The menu.
        quantity: One of `QUANTITIES`.
        without: Kinds and classes that may not be chosen, as of `choose`.
    """
    choice = least_possible(menu, quantity, without)
    least = getattr(choice.costs, quantity)
    parts = {name: getattr(form.costs, quantity) for name, form in choice.outer.items()}
    parts[FIXED] = getattr(menu.fixed, quantity)
    parts[LAYERS] = least - sum(parts.values())
    by_size = sorted(parts.items(), key=lambda item: -item[1])
    return Floor(quantity, least, {name: amount for name, amount in by_size if amount > 0})


def check_budget(budget: Budget, menu: Menu, without: Collection[str] = ()) -> None:
    """Checks that each limit alone can be met.

    Raises:
        RefoldError: A limit is below the floor; the message names the parts of the floor. Or there is nothing to do.
    """
    limits = budget.limits(menu.source)
    for quantity in QUANTITIES:
        bound, source = getattr(limits, quantity), getattr(menu.source, quantity)
        if bound is None:
            continue
        floor = find_floor(menu, quantity, without)
        if floor.least > bound:
            flag = "latency" if quantity == "milliseconds" else quantity
            raise RefoldError(
                f"--{flag}: {floor.describe(source)} is required (got {budget.limited[flag].text}, which is "
                f"{format_quantity(quantity, bound)}); raise it"
            )
