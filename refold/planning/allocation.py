"""Ranks that follow evidence: a budget dealt to linears and depths by what each rank saves of the error."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from refold.blueprint.schema import Blueprint, DepthSpec, Part, Pool
from refold.errors import RecipeError
from refold.families.arch import Frozen

ROUNDS = 100
"""Halvings of the price; more than a double has bits."""


class Curve(Frozen):
    """What is lost of a matrix at some ranks, ascending; convex, and between them a straight line."""

    ranks: tuple[int, ...]
    lost: tuple[float, ...]

    def at(self, rank: int) -> float:
        """What is lost at a rank."""
        place = min(bisect_left(self.ranks, rank), len(self.ranks) - 1)
        if self.ranks[place] <= rank or place == 0:
            return self.lost[place]
        low, high = self.ranks[place - 1], self.ranks[place]
        share = (rank - low) / (high - low)
        return self.lost[place - 1] + share * (self.lost[place] - self.lost[place - 1])

    def smallest(self, lost: float) -> int:
        """The smallest rank that loses no more than `lost`."""
        return next((rank for rank in range(self.ranks[-1] + 1) if self.at(rank) <= lost), self.ranks[-1])

    def best(self, price: float, least: int = 0) -> int:
        """The rank, one of the curve's own and at least `least`, at which loss and price together are lowest."""
        return min(
            (rank for rank in self.ranks if rank >= least), key=lambda rank: (self.at(rank) + price * rank, rank)
        )


class SharedCurve(Frozen):
    """A curve whose ranks are dealt to several depths in turn."""

    curve: Curve
    depths: tuple[int, ...]


class MeasuredLinear(Frozen):
    """What there is to choose for one stored linear.

    Every loss is in one unit, so that those of different linears can be compared.
    """

    pool: Pool
    part: int
    linear: str
    rows: int
    columns: int
    depths: tuple[int, ...]
    """That run it."""
    stored: Curve
    """Lost by the stored matrix at a rank, where no depth has a LoRA."""
    together: tuple[SharedCurve, ...] = ()
    """Lost with the stored matrix whole, at the ranks of the LoRAs; none where one depth alone runs it."""
    apart: tuple[Curve, ...] = ()
    """For each depth what is lost of its source's weight at a rank, with nothing stored."""
    is_basis: bool = False
    """Whether no more than a basis is stored, and each depth has coefficients; `stored` is what all lose together."""

    @property
    def whole(self) -> int:
        """Parameters of the stored matrix."""
        return self.rows * self.columns

    @property
    def unit(self) -> int:
        """Parameters of one rank."""
        return self.columns + self.rows * (len(self.depths) if self.is_basis else 1)


class Choice(Frozen):
    """Which linears may be kept as factors, and which get LoRAs by measurement."""

    factors: bool
    loras: bool


class _Piece(NamedTuple):
    """A curve whose rank is to be chosen, and what it is the rank of."""

    curve: Curve
    least: int
    depths: tuple[int, ...]
    """That share it as LoRA; none: it is the stored linear's."""


class _Way(NamedTuple):
    """One way to keep a linear: what it costs and loses whatever its ranks are, and curves to choose ranks on."""

    base: int
    lost: float
    pieces: tuple[_Piece, ...]
    stores: bool
    """Whether anything is stored besides the LoRAs."""


def allocate(linears: Sequence[MeasuredLinear], blueprint: Blueprint, choice: Choice, budget: int) -> Blueprint:
    """Deals a budget to linears and depths so that their losses add up to as little as possible.

    For a price per parameter every linear takes the way and the ranks at which its loss and its price are lowest
    together; the price is the lowest that the budget can pay. What is left over goes where it saves most.

    Args:
        linears: What was measured, in one unit.
        blueprint: The stack; its ranks and factors of these linears are replaced.
        choice: What may be chosen.
        budget: Parameters for these linears with their LoRAs.

    Returns:
        The blueprint with its ranks.

    Raises:
        RecipeError: Not even the smallest ranks fit.
    """
    ways = [_ways(linear, choice, blueprint) for linear in linears]
    scale = max(way.lost + sum(piece.curve.lost[0] for piece in way.pieces) for each in ways for way in each)
    low, high = 0.0, max(scale, 1e-30)
    taken = _take(linears, ways, high)
    least = sum(_cost(linear, *one) for linear, one in zip(linears, taken, strict=True))
    if least > budget:
        raise RecipeError(
            f"factor.parameters, relax.rank.parameters: at least {least:,} parameters are required for the smallest "
            f"ranks (got {budget:,}); raise the share"
        )
    for _ in range(ROUNDS):
        price = (low + high) / 2
        found = _take(linears, ways, price)
        if sum(_cost(linear, *one) for linear, one in zip(linears, found, strict=True)) <= budget:
            high, taken = price, found
        else:
            low = price
    _spend_rest(linears, taken, budget)
    factors, bases = _factors(linears, taken)
    return with_ranks(blueprint, _ranks(linears, taken), factors, bases)


def keep_energy(linears: Sequence[MeasuredLinear], blueprint: Blueprint, energy: float) -> Blueprint:
    """Gives each tied linear the smallest LoRAs that keep a share of what tying lost."""
    taken = []
    for linear in linears:
        pieces = tuple(_Piece(shared.curve, 0, shared.depths) for shared in linear.together)
        ranks = [piece.curve.smallest((1 - energy) * piece.curve.lost[0]) for piece in pieces]
        taken.append((_Way(linear.whole, 0.0, pieces, stores=True), ranks))
    return with_ranks(blueprint, _ranks(linears, taken), {})


def with_ranks(
    blueprint: Blueprint,
    ranks: Mapping[int, Mapping[str, int]],
    factors: Mapping[tuple[Pool, int], Mapping[str, int | None]],
    bases: Mapping[tuple[Pool, int], Mapping[str, int]] | None = None,
) -> Blueprint:
    """Returns the blueprint with other ranks in place of its own of the same name.

    Args:
        blueprint: The stack.
        ranks: By depth, of LoRAs; 0: none.
        factors: By part, of linears kept as factors; None: the whole matrix is kept.
        bases: By part, of linears of which a basis is kept.
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


def _ways(linear: MeasuredLinear, choice: Choice, blueprint: Blueprint) -> list[_Way]:
    if linear.is_basis:
        return [_Way(0, 0.0, (_Piece(linear.stored, 1, ()),), stores=True)]
    if choice.loras and linear.together:
        ways = [
            _Way(
                linear.whole,
                0.0,
                tuple(_Piece(shared.curve, 0, shared.depths) for shared in linear.together),
                stores=True,
            )
        ]
        if choice.factors:
            apart = zip(linear.apart, linear.depths, strict=True)
            ways.append(_Way(0, 0.0, tuple(_Piece(curve, 1, (depth,)) for curve, depth in apart), stores=False))
        return ways
    # What depths add by LoRAs of a given rank is paid already, and the same whatever is stored.
    ways = [_Way(linear.whole, linear.stored.lost[-1], (), stores=True)]
    if choice.factors:
        ways.append(_Way(0, 0.0, (_Piece(linear.stored, 1, ()),), stores=True))
    return ways


Taken = tuple[_Way, list[int]]


def _take(linears: Sequence[MeasuredLinear], ways: Sequence[Sequence[_Way]], price: float) -> list[Taken]:
    found = []
    for linear, each in zip(linears, ways, strict=True):
        options = []
        for way in each:
            ranks = [piece.curve.best(price * linear.unit, piece.least) for piece in way.pieces]
            lost = way.lost + sum(piece.curve.at(rank) for piece, rank in zip(way.pieces, ranks, strict=True))
            options.append((lost + price * _cost(linear, way, ranks), len(options), way, ranks))
        _, _, way, ranks = min(options, key=lambda option: option[:2])
        found.append((way, ranks))
    return found


def _cost(linear: MeasuredLinear, way: _Way, ranks: Iterable[int]) -> int:
    return way.base + linear.unit * sum(ranks)


def _spend_rest(linears: Sequence[MeasuredLinear], taken: list[Taken], budget: int) -> None:
    left = budget - sum(_cost(linear, *one) for linear, one in zip(linears, taken, strict=True))
    offers = []
    for index, (linear, (way, ranks)) in enumerate(zip(linears, taken, strict=True)):
        for place, (piece, rank) in enumerate(zip(way.pieces, ranks, strict=True)):
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
    for linear, (way, ranks) in zip(linears, taken, strict=True):
        for piece, total in zip(way.pieces, ranks, strict=True):
            for place, depth in enumerate(piece.depths):
                share = total // len(piece.depths) + (place < total % len(piece.depths))
                found.setdefault(depth, {})[linear.linear] = min(share, linear.rows, linear.columns)
    return found


def _factors(
    linears: Sequence[MeasuredLinear], taken: Sequence[Taken]
) -> tuple[dict[tuple[Pool, int], dict[str, int | None]], dict[tuple[Pool, int], dict[str, int]]]:
    """Ranks of what is stored as factors, and of bases."""
    found: dict[tuple[Pool, int], dict[str, int | None]] = {}
    bases: dict[tuple[Pool, int], dict[str, int]] = {}
    for linear, (way, ranks) in zip(linears, taken, strict=True):
        own = [rank for piece, rank in zip(way.pieces, ranks, strict=True) if not piece.depths]
        whole = None if way.stores else 0
        if linear.is_basis:
            bases.setdefault((linear.pool, linear.part), {})[linear.linear] = own[0]
        else:
            found.setdefault((linear.pool, linear.part), {})[linear.linear] = own[0] if own else whole
    return found, bases
