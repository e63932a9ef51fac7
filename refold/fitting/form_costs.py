"""Costs of the forms of a matrix and of a part, as `refold.blueprint.cost` counts them."""

from collections.abc import Callable
from math import prod

from refold.blueprint.cost import STATE_BYTES
from refold.blueprint.integers import find_scheme
from refold.families.arch import ArchSpec
from refold.fitting.menu import Costs, MatrixForm, Menu, MenuMatrix, PartForm, PartMenu, TieForm
from refold.mixers.spec import MixerSpec, PartSpec

FLOAT_BYTES = 2
"""Bytes of a number that is stored as a float, in weights and in caches."""

Clock = Callable[[int, int, str | None, int | None], float]
"""Returns the milliseconds of one decoded token in a matrix, from rows, columns, scheme (None: floats) and rank (None:
whole)."""


def matrix_costs(rows: int, columns: int, scheme: str | None, rank: int | None) -> Costs:
    """Returns bytes and FLOPs of a matrix `[rows, columns]` that one depth runs once for a token.

    Args:
        rows: Outputs.
        columns: Inputs.
        scheme: Scheme of its integers; None: floats of two bytes.
        rank: Rank of its two factors; None: whole.
    """
    shapes = ((rows, columns),) if rank is None else ((rank, columns), (rows, rank))
    numbers = sum(prod(shape) for shape in shapes)
    if scheme is None:
        return Costs(bytes=FLOAT_BYTES * numbers, flops=2 * numbers)
    stored = find_scheme(scheme)
    return Costs(bytes=sum(stored.num_bytes(*shape) for shape in shapes), flops=2 * numbers)


def part_costs(spec: PartSpec, arch: ArchSpec, window: int | None, context: int) -> Costs:
    """Returns the costs of a part beside those of its linears: vectors, cache, state, and FLOPs of attention.

    Args:
        spec: The mixer or the MLP.
        arch: The source, with the sizes of this part.
        window: Number of tokens that a token attends to; None: all.
        context: Tokens at which cache and FLOPs are counted.
    """
    stored = FLOAT_BYTES * sum(prod(shape) for shape in spec.vectors(arch).values())
    if not isinstance(spec, MixerSpec):
        return Costs(bytes=stored, flops=spec.flops_per_token(arch))
    reached = context if window is None else min(context, window)
    kept = FLOAT_BYTES * (spec.cache_elements_per_token(arch) * reached + spec.kept_elements(arch))
    return Costs(
        bytes=stored,
        cache=kept + STATE_BYTES * spec.state_elements(arch),
        flops=spec.flops_per_token(arch) + spec.flops_per_context_token(arch) * reached,
    )


def timed_menu(menu: Menu, clock: Clock) -> Menu:
    """Returns a menu with the milliseconds of every matrix form, and of the source.

    Args:
        menu: A menu, with or without times.
        clock: Milliseconds of one matrix.
    """
    parts = tuple(
        PartMenu(layer=part.layer, pool=part.pool, forms=tuple(_timed_part(form, clock) for form in part.forms))
        for part in menu.parts
    )
    # Reading a row of an embedding that is no head takes no time.
    times = (0, 1) if len(menu.outer) > 1 else (1,)
    outer = tuple(_timed(matrix, clock, each) for matrix, each in zip(menu.outer, times, strict=True))
    ties = tuple(_timed_tie(tie, clock) for tie in menu.ties)
    whole = (*(matrix for part in parts for matrix in part.forms[0].matrices), *outer)
    source = menu.source._replace(milliseconds=sum(matrix.forms[0].costs.milliseconds for matrix in whole))
    return menu.model_copy(update={"parts": parts, "outer": outer, "ties": ties, "source": source})


def _timed_part(form: PartForm, clock: Clock) -> PartForm:
    return form.model_copy(update={"matrices": tuple(_timed(matrix, clock) for matrix in form.matrices)})


def _timed_tie(tie: TieForm, clock: Clock) -> TieForm:
    matrices = tuple(_timed(matrix, clock, len(tie.layers)) for matrix in tie.matrices)
    return tie.model_copy(update={"matrices": matrices})


def _timed(matrix: MenuMatrix, clock: Clock, times: int = 1) -> MenuMatrix:
    def timed(form: MatrixForm) -> MatrixForm:
        spent = times * clock(matrix.rows, matrix.columns, form.scheme, form.rank)
        return form.model_copy(update={"costs": form.costs._replace(milliseconds=spent)})

    return matrix.model_copy(update={"forms": tuple(timed(form) for form in matrix.forms)})
