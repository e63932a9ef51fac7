"""Measured ranks: divides a parameter budget among linears and depths so that the total error is least."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import NamedTuple

from refold.blueprint.schema import Blueprint, DepthSpec, Part, Pool
from refold.errors import RecipeError
from refold.families.arch import Frozen

ROUNDS = 100
"""Halvings of the price interval; more than the bits of a double."""


class Curve(Frozen):
    """The error of a matrix as a function of its rank: convex, ascending ranks, linear between two ranks."""

    ranks: tuple[int, ...]
    lost: tuple[float, ...]

    def at(self, rank: int) -> float:
        """Returns the error at a rank."""
        place = min(bisect_left(self.ranks, rank), len(self.ranks) - 1)
        if self.ranks[place] <= rank or place == 0:
            return self.lost[place]
        low, high = self.ranks[place - 1], self.ranks[place]
        share = (rank - low) / (high - low)
        return self.lost[place - 1] + share * (self.lost[place] - self.lost[place - 1])

    def smallest(self, lost: float) -> int:
        """Returns the smallest rank whose error is at most `lost`."""
        return next((rank for rank in range(self.ranks[-1] + 1) if self.at(rank) <= lost), self.ranks[-1])

    def best(self, price: float, least: int = 0) -> int:
        """Returns the rank of the curve, at least `least`, with the lowest sum of error and price."""
        return min(
            (rank for rank in self.ranks if rank >= least), key=lambda rank: (self.at(rank) + price * rank, rank)
        )

    def including(self, rank: int) -> "Curve":
        """Returns the same curve with a rank, at most its last, among its ranks."""
        ranks = tuple(sorted({*self.ranks, rank}))
        return Curve(ranks=ranks, lost=tuple(self.at(each) for each in ranks))


class SharedCurve(Frozen):
    """A curve whose rank is divided evenly among several depths."""

    curve: Curve
    depths: tuple[int, ...]


class MeasuredLinear(Frozen):
    """The measured error curves of one stored linear. All errors have one unit, so that linears can be compared."""

    pool: Pool
    part: int
    linear: str
    rows: int
    columns: int
    depths: tuple[int, ...]
    """Depths that run the linear."""
    stored: Curve
    """Error of the stored matrix, by its rank, without LoRAs."""
    together: tuple[SharedCurve, ...] = ()
    """Errors with a whole stored matrix, by the rank of the LoRAs; empty for a linear of a single depth."""
    apart: tuple[Curve, ...] = ()
    """For each depth the error of its source's weight, by the rank of the LoRA, without a stored matrix."""
    is_basis: bool = False
    """Whether only a basis is stored and each depth has coefficients; `stored` is then the error of all depths."""

    @property
    def whole(self) -> int:
        """Number of parameters of the stored matrix."""
        return self.rows * self.columns

    @property
    def unit(self) -> int:
        """Number of parameters of one rank."""
        return self.columns + self.rows * (len(self.depths) if self.is_basis else 1)


class Choice(Frozen):
    """The ranks that are measured: those of stored factors, of LoRAs, or of both."""

    factors: bool
    loras: bool
    floor: float = 0.0
    """Smallest rank of stored factors, and of factors of one depth, as a share of the even rank."""
    multiple: int = 1
    """Multiple to which ranks are rounded down afterwards; the floor is one."""

    def least(self, even: int | None) -> int:
        """Returns the smallest rank of a linear with an even rank; None: it is stored whole by an even split."""
        if even is None:
            return 1
        least = max(1, ceil(self.floor * even))
        if least > self.multiple:
            least = ceil(least / self.multiple) * self.multiple
        return min(least, max(even, 1))


class _Piece(NamedTuple):
    """A rank to choose, with its error curve."""

    curve: Curve
    least: int
    depths: tuple[int, ...]
    """Depths that share the rank for their LoRAs; empty: the rank of the stored linear."""


class _Form(NamedTuple):
    """A form in which a linear can be stored: its fixed parameters and error, and the ranks to choose."""

    base: int
    lost: float
    pieces: tuple[_Piece, ...]
    stores: bool
    """Whether a matrix, factors or a basis are stored besides the LoRAs."""


def allocate(linears: Sequence[MeasuredLinear], blueprint: Blueprint, choice: Choice, budget: int) -> Blueprint:
    """Divides a parameter budget among linears and depths so that the sum of their errors is least.

    Given a price for each parameter, every linear takes the form and ranks with the lowest sum of error and price. A
    bisection finds the lowest price whose choices fit into the budget. The rest of the budget goes to the ranks that
    lower the error most for each parameter.

    Args:
        linears: The measured linears.
        blueprint: The stack with even ranks, which are replaced.
        choice: The ranks to choose.
        budget: Parameters of these linears and their LoRAs.

    Returns:
        The blueprint with the chosen ranks.

    Raises:
        RecipeError: The smallest ranks do not fit into the budget.
    """
    forms = [_forms(linear, choice, blueprint) for linear in linears]
    scale = max(form.lost + sum(piece.curve.lost[0] for piece in form.pieces) for each in forms for form in each)
    low, high = 0.0, max(scale, 1e-30)
    taken = _take(linears, forms, high)
    least = sum(_cost(linear, *one) for linear, one in zip(linears, taken, strict=True))
    if least > budget:
        raise RecipeError(
            f"factor.parameters, relax.rank.parameters: at least {least:,} parameters are required for the smallest "
            f"ranks (got {budget:,}); raise the share"
        )
    for _ in range(ROUNDS):
        price = (low + high) / 2
        found = _take(linears, forms, price)
        if sum(_cost(linear, *one) for linear, one in zip(linears, found, strict=True)) <= budget:
            high, taken = price, found
        else:
            low = price
    _spend_rest(linears, taken, budget)
    factors, bases = _factors(linears, taken)
    return with_ranks(blueprint, _ranks(linears, taken), factors, bases)


def keep_energy(linears: Sequence[MeasuredLinear], blueprint: Blueprint, energy: float) -> Blueprint:
    """Gives each tied linear the smallest LoRAs that restore the share `energy` of its tying error."""
    taken = []
    for linear in linears:
        pieces = tuple(_Piece(shared.curve, 0, shared.depths) for shared in linear.together)
        ranks = [piece.curve.smallest((1 - energy) * piece.curve.lost[0]) for piece in pieces]
        taken.append((_Form(linear.whole, 0.0, pieces, stores=True), ranks))
    return with_ranks(blueprint, _ranks(linears, taken), {})


def with_ranks(
    blueprint: Blueprint,
    ranks: Mapping[int, Mapping[str, int]],
    factors: Mapping[tuple[Pool, int], Mapping[str, int | None]],
    bases: Mapping[tuple[Pool, int], Mapping[str, int]] | None = None,
) -> Blueprint:
    """Returns the blueprint with some ranks replaced.

    Args:
        blueprint: The stack.
        ranks: Ranks of LoRAs, by depth and linear; 0: no LoRA.
        factors: Ranks of stored factors, by part and linear; None: the whole matrix is stored.
        bases: Ranks of stored bases, by part and linear.
    """

    def depth(index: int, old: DepthSpec) -> DepthSpec:
        merged = {**old.ranks, **ranks.get(index, {})}
        return old.model_copy(update={"ranks": {name: rank for name, rank in merged.items() if rank}})

    def part(pool: Pool, index: int, old: Part) -> Part:
        merged = {**old.factors, **factors.get((pool, index), {})}
        kept = {name: rank for name, rank in merged.items() if rank is not None}
        shared = {**old.bases, **(bases or {}).get((pool, index), {})}
        return old.model_copy(update={"factors": kept, "bases": shared})

    return Blueprint.model_validate(
        blueprint.model_copy(
            update={
                "mixers": tuple(part("mixer", index, old) for index, old in enumerate(blueprint.mixers)),
                "mlps": tuple(part("mlp", index, old) for index, old in enumerate(blueprint.mlps)),
                "depths": tuple(depth(index, old) for index, old in enumerate(blueprint.depths)),
            }
        ).model_dump()
    )


def _forms(linear: MeasuredLinear, choice: Choice, blueprint: Blueprint) -> list[_Form]:
    part = blueprint.pool(linear.pool)[linear.part]
    least = choice.least((part.bases if linear.is_basis else part.factors).get(linear.linear))
    if linear.is_basis:
        return [_Form(0, 0.0, (_Piece(linear.stored.including(least), least, ()),), stores=True)]
    if choice.loras and linear.together:
        forms = [
            _Form(
                linear.whole,
                0.0,
                tuple(_Piece(shared.curve, 0, shared.depths) for shared in linear.together),
                stores=True,
            )
        ]
        if choice.factors:
            apart = zip(linear.apart, linear.depths, strict=True)
            forms.append(
                _Form(
                    0,
                    0.0,
                    tuple(_Piece(curve.including(least), least, (depth,)) for curve, depth in apart),
                    stores=False,
                )
            )
        return forms
    # LoRAs with a fixed rank are already in the budget, and their size does not depend on how the weight is stored.
    forms = [_Form(linear.whole, linear.stored.lost[-1], (), stores=True)]
    if choice.factors:
        forms.append(_Form(0, 0.0, (_Piece(linear.stored.including(least), least, ()),), stores=True))
    return forms


Taken = tuple[_Form, list[int]]


def _take(linears: Sequence[MeasuredLinear], forms: Sequence[Sequence[_Form]], price: float) -> list[Taken]:
    found = []
    for linear, each in zip(linears, forms, strict=True):
        options = []
        for form in each:
            ranks = [piece.curve.best(price * linear.unit, piece.least) for piece in form.pieces]
            lost = form.lost + sum(piece.curve.at(rank) for piece, rank in zip(form.pieces, ranks, strict=True))
            options.append((lost + price * _cost(linear, form, ranks), len(options), form, ranks))
        _, _, form, ranks = min(options, key=lambda option: option[:2])
        found.append((form, ranks))
    return found


def _cost(linear: MeasuredLinear, form: _Form, ranks: Iterable[int]) -> int:
    return form.base + linear.unit * sum(ranks)


def _spend_rest(linears: Sequence[MeasuredLinear], taken: list[Taken], budget: int) -> None:
    left = budget - sum(_cost(linear, *one) for linear, one in zip(linears, taken, strict=True))
    offers = []
    for index, (linear, (form, ranks)) in enumerate(zip(linears, taken, strict=True)):
        for place, (piece, rank) in enumerate(zip(form.pieces, ranks, strict=True)):
            further = next((each for each in piece.curve.ranks if each > rank), None)
            if further is not None:
                saved = (piece.curve.at(rank) - piece.curve.at(further)) / (further - rank) / linear.unit
                offers.append((-saved, index, place, further - rank))
    for _, index, place, most in sorted(offers):
        more = min(most, left // linears[index].unit)
        taken[index][1][place] += more
        left -= more * linears[index].unit


def _ranks(linears: Sequence[MeasuredLinear], taken: Sequence[Taken]) -> dict[int, dict[str, int]]:
    found: dict[int, dict[str, int]] = {}
    for linear, (form, ranks) in zip(linears, taken, strict=True):
        for piece, total in zip(form.pieces, ranks, strict=True):
            for place, depth in enumerate(piece.depths):
                share = total // len(piece.depths) + (place < total % len(piece.depths))
                found.setdefault(depth, {})[linear.linear] = min(share, linear.rows, linear.columns)
    return found


def _factors(
    linears: Sequence[MeasuredLinear], taken: Sequence[Taken]
) -> tuple[dict[tuple[Pool, int], dict[str, int | None]], dict[tuple[Pool, int], dict[str, int]]]:
    """Returns the ranks of stored factors and of stored bases, by part and linear."""
    found: dict[tuple[Pool, int], dict[str, int | None]] = {}
    bases: dict[tuple[Pool, int], dict[str, int]] = {}
    for linear, (form, ranks) in zip(linears, taken, strict=True):
        own = [rank for piece, rank in zip(form.pieces, ranks, strict=True) if not piece.depths]
        whole = None if form.stores else 0
        if linear.is_basis:
            bases.setdefault((linear.pool, linear.part), {})[linear.linear] = own[0]
        else:
            found.setdefault((linear.pool, linear.part), {})[linear.linear] = own[0] if own else whole
    return found, bases
