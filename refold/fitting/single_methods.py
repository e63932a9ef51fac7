"""Single methods at the budget of a fit: for each, the largest model of that method within the limits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from refold.errors import RecipeError, RefoldError
from refold.families.arch import ArchSpec
from refold.fitting.look import STORED_BYTES, Looked, Looker, RecipeMapping
from refold.fitting.menu import Costs
from refold.planning.plan import plan_model
from refold.recipe.load import load_recipe

STEPS = 96
"""Sizes of a method that is told by a share."""
WINDOWS = (256, 128, 64, 32)
"""Sizes of windows: longer ones would show no loss, whatever they lose, on evaluated sequences of 512 tokens."""
MOST_TRIES = 5
"""Sizes of a method that are converted to find one within the limits."""
DTYPES = {2: "bfloat16", 4: "float32"}


@dataclass(frozen=True)
class SizedMethod:
    """A method by itself, with sizes from the largest to the smallest.

    Attributes:
        name: Name in reports.
        num_sizes: Number of its sizes, for a source.
        recipe: Returns the recipe of one size; size 0 is the largest.
    """

    name: str
    num_sizes: Callable[[ArchSpec], int]
    recipe: Callable[[ArchSpec, int], dict[str, Any]]


def _whole(scheme: str) -> SizedMethod:
    return SizedMethod(scheme, lambda arch: 1, lambda arch, size: {"quantise": {"to": scheme}})


def _share(size: int) -> float:
    return round(1 - (size + 1) / (STEPS + 1), 4)


def _low_rank(arch: ArchSpec, size: int) -> dict[str, Any]:
    return {"factor": {"parameters": _share(size), "split": "measured", "weight": "fisher"}}


def _width(arch: ArchSpec, size: int) -> dict[str, Any]:
    share = _share(size)
    heads = {"heads": share} if arch.num_key_value_heads > 1 else {}
    return {"width": {"mlp": share, **heads, "split": "measured", "weight": "fisher"}}


def _pruned(arch: ArchSpec, size: int) -> dict[str, Any]:
    return {"drop": {"sublayers": {"count": size + 1, "by": "similarity"}}}


def _recursive(arch: ArchSpec, size: int) -> dict[str, Any]:
    """Two loops with less and less relaxation, then more loops without."""
    ranks = (0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
    if size < len(ranks):
        relax = {"rank": {"parameters": ranks[size]}, "init": "joint", "weight": "fisher", "vectors": "own"}
        return {"fold": {"loops": 2, "uneven": "prelude"}, "relax": relax}
    return {"fold": {"loops": size - len(ranks) + 2, "init": "average", "uneven": "prelude"}}


def _windows(arch: ArchSpec, size: int) -> dict[str, Any]:
    layers = [index for index, each in enumerate(arch.layers) if each.window is None or each.window > WINDOWS[size]]
    return {"mixers": [{"type": "attention", "window": WINDOWS[size], "depths": layers}]}


SINGLE_METHODS = (
    _whole("int8"),
    _whole("int4"),
    SizedMethod("low rank", lambda arch: STEPS, _low_rank),
    SizedMethod("pruning", lambda arch: 2 * arch.num_layers - 2, _pruned),
    SizedMethod("width", lambda arch: STEPS, _width),
    SizedMethod("recursion", lambda arch: 5 + arch.num_layers, _recursive),
    SizedMethod("windows", lambda arch: len(WINDOWS), _windows),
)
"""All single methods that a fit compares with."""


def in_integers(method: SizedMethod, scheme: str) -> SizedMethod:
    """Returns a method with its weights stored by a scheme besides: a pair made by hand."""
    return SizedMethod(
        f"{method.name} in {scheme}",
        method.num_sizes,
        lambda arch, size: {**method.recipe(arch, size), "quantise": {"to": scheme}},
    )


class Single(NamedTuple):
    """A single method at a budget: a measured model, or the reason why there is none."""

    name: str
    looked: Looked | None
    reason: str


@dataclass(frozen=True)
class SingleFits:
    """Makes the largest model of each single method within limits.

    Attributes:
        looker: Converts and measures recipes of the source.
        limits: Upper limits by quantity.
        source: Costs of the source, for messages.
        shared: Keys that every recipe gets, such as `calibration`.
    """

    looker: Looker
    limits: Mapping[str, float]
    source: Costs
    shared: RecipeMapping

    def make(self, method: SizedMethod) -> Single:
        """Converts and measures the largest model of a method within the limits.

        Ranks and widths that are measured are planned as even, and may need a little more. Then smaller sizes follow.
        """
        size = self._find_size(method)
        if isinstance(size, str):
            return Single(method.name, None, size)
        num_sizes = method.num_sizes(self.looker.model.arch)
        for _ in range(MOST_TRIES):
            try:
                looked = self.looker.look(self._recipe(method, size), method.name, "report")
            except RefoldError as error:
                return Single(method.name, None, str(error))
            over = self._excess(looked.costs)
            if not over:
                return Single(method.name, looked, "")
            size += max(1, round(max(over.values()) * num_sizes))
            if size >= num_sizes:
                break
        return Single(method.name, None, "no size was found within the limits")

    def _find_size(self, method: SizedMethod) -> int | str:
        """Returns the largest size that is planned within the limits, by bisection; or why there is none."""
        high = method.num_sizes(self.looker.model.arch)
        if high < 1:
            return "the source has no such size"
        smallest = high - 1
        while smallest > 0 and isinstance(self._planned_excess(method, smallest), str):
            smallest -= 1
        left = self._planned_excess(method, smallest)
        if isinstance(left, str):
            return left
        if left:
            needed = {name: self.limits[name] / getattr(self.source, name) + share for name, share in left.items()}
            return ", ".join(f"{name} {share:.0%} at least" for name, share in needed.items())
        low, high = 0, smallest
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._planned_excess(method, middle) == {} else (middle + 1, high)
        return low

    def _planned_excess(self, method: SizedMethod, size: int) -> dict[str, float] | str:
        """Returns `_excess` of a planned size; or the reason why the recipe does not fit the source."""
        try:
            plan = plan_model(self.looker.model, load_recipe(self._recipe(method, size)), allow_larger=True)
        except RecipeError as error:
            return str(error)
        return self._excess(self.looker.costs(plan.blueprint))

    def _excess(self, costs: Costs) -> dict[str, float]:
        """Returns how far costs are above their limits, as shares of the source."""
        counted = costs._asdict()
        over = {name: (counted[name] - limit) / getattr(self.source, name) for name, limit in self.limits.items()}
        return {name: share for name, share in over.items() if share > 0}

    def _recipe(self, method: SizedMethod, size: int) -> dict[str, Any]:
        return {**self.shared, "dtype": DTYPES[STORED_BYTES], **method.recipe(self.looker.model.arch, size)}
