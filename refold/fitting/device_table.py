"""A device's table: milliseconds of linears, parts and steps when one token is decoded, measured on a machine."""

import math
import os
import platform
import statistics
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from refold.blueprint.integers import find_scheme
from refold.checkpoint.atomic_file import write_text
from refold.errors import RefoldError
from refold.families.arch import Frozen
from refold.fitting.form_costs import Clock
from refold.nn.processor import processor_field

TABLE_FORMAT = 1
ENGINE = "refold"
INT8_COLUMNS = 16
"""Columns that the kernel of int8 takes are a multiple of this number."""


class MeasuredMachine(Frozen):
    """Where a table was measured."""

    processor: str
    """Name of the processor or accelerator."""
    system: str
    threads: int
    device: str
    """`cpu` or `cuda`."""
    dtype: str
    """Dtype of activations and of weights that are floats, such as `float32`."""
    engine: str = ENGINE
    versions: dict[str, str] = Field(default_factory=dict)

    def describe(self) -> str:
        """Returns the machine in words."""
        return f"{self.processor}, {self.threads} threads, {self.dtype}, engine {self.engine}"


class LinearTime(Frozen):
    """Time of one linear `[rows, columns]` for a batch of tokens."""

    rows: int
    columns: int
    scheme: str | None
    """Scheme of the integers; None: floats."""
    batch: int
    milliseconds: float = Field(gt=0)


class PartTime(Frozen):
    """Time of one mixer or MLP beside its linears: norms, attention, activation, cache, calls."""

    kind: str
    """`mlp`, or a type of mixer."""
    hidden: int
    heads: int
    """Query heads; 0 for an MLP."""
    head_dim: int
    context: int
    """Tokens that are attended to; the window where there is one; 0 for an MLP."""
    batch: int
    milliseconds: float = Field(ge=0)


class InterpolationError(Frozen):
    """Relative error of interpolated times, where each measured time in turn is left out."""

    median: float
    largest: float
    points: int


class DeviceTable(Frozen):
    """All times that were measured on one machine."""

    format: Literal[1] = TABLE_FORMAT
    machine: MeasuredMachine
    linears: tuple[LinearTime, ...] = Field(min_length=1)
    parts: tuple[PartTime, ...] = ()
    step: dict[int, float] = Field(default_factory=dict)
    """Milliseconds of a step beside layers and head, by batch: embedding, last norm, calls."""
    interpolation: InterpolationError | None = None
    """Error of times of linears between the measured shapes."""

    def save(self, path: Path) -> None:
        """Writes the table.

        Raises:
            FolderError: The file cannot be written.
        """
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @cached_property
    def _grids(self) -> dict["GridKey", "ShapeGrid"]:
        return shape_grids(self.linears)

    def grid(self, scheme: str | None, batch: int, columns: int) -> "ShapeGrid":
        """Returns the times of linears of one scheme; integers without a kernel for the columns have their own.

        Raises:
            RefoldError: The scheme or the batch was not measured.
        """
        key = GridKey(scheme, batch, _has_kernel(scheme, columns))
        if key not in self._grids:
            known = sorted({each.describe() for each in self._grids})
            raise RefoldError(
                f"device table: times of {key.describe()} are required (it has {', '.join(known)}); measure again with "
                f"refold fit --measure-device"
            )
        return self._grids[key]

    def linear_ms(self, rows: int, columns: int, scheme: str | None, rank: int | None = None, batch: int = 1) -> float:
        """Returns milliseconds of one linear; of two factors, the sum of both.

        Args:
            rows: Outputs.
            columns: Inputs.
            scheme: Scheme of the integers; None: floats.
            rank: Rank of the two factors; None: whole.
            batch: Tokens at once.

        Raises:
            RefoldError: The scheme or the batch was not measured.
        """
        if rank is not None:
            shapes = ((rank, columns), (rows, rank)) if rank else ()
            return math.fsum(self.linear_ms(*shape, scheme, None, batch) for shape in shapes)
        return self.grid(scheme, batch, columns).at(rows, columns)

    def part_ms(self, kind: str, hidden: int, size: int, context: int, batch: int = 1) -> float:
        """Returns milliseconds of a part beside its linears.

        The time grows linearly between measured contexts and beyond them. Of the hidden sizes the nearest was measured;
        the growth with the context is scaled by the heads.

        Args:
            kind: `mlp`, or a type of mixer.
            hidden: Hidden size.
            size: Query heads times head size; 0 for an MLP.
            context: Tokens that are attended to.
            batch: Tokens at once.

        Raises:
            RefoldError: The kind or the batch was not measured.
        """
        known = [each for each in self.parts if each.kind == kind and each.batch == batch]
        if not known:
            kinds = sorted({each.kind for each in self.parts})
            raise RefoldError(
                f"device table: times of {kind} at batch {batch} are required (it has {', '.join(kinds) or 'none'}); "
                f"measure again with refold fit --measure-device"
            )

        def distance(each: PartTime) -> tuple[float, float]:
            own = each.heads * each.head_dim
            return abs(math.log(each.hidden / hidden)), abs(math.log(max(1, own) / max(1, size)))

        nearest = min(known, key=distance)
        own = nearest.heads * nearest.head_dim
        shape = (nearest.hidden, nearest.heads, nearest.head_dim)
        same = [each for each in known if (each.hidden, each.heads, each.head_dim) == shape]
        times = sorted({each.context: each.milliseconds for each in same}.items())
        base = times[0][1]
        return base + (_along(times, context) - base) * (size / own if own else 1.0)

    def step_ms(self, batch: int = 1) -> float:
        """Returns milliseconds of a step beside layers and head; 0 if that was not measured."""
        return self.step.get(batch, 0.0)


class GridKey(NamedTuple):
    """The scheme, batch and kernel of the times of one grid.

    Attributes:
        scheme: Scheme of the integers; None: floats.
        batch: Tokens at once.
        has_kernel: Whether the scheme's kernel accepts the columns, if it has one; others are dequantised for each
            product.
    """

    scheme: str | None
    batch: int
    has_kernel: bool

    def describe(self) -> str:
        """Returns the key in words."""
        columns = "" if self.has_kernel else f" with columns that are no multiple of {_kernel_columns(self.scheme)}"
        return f"{self.scheme or 'floats'} at batch {self.batch}{columns}"


def shape_grids(linears: Sequence[LinearTime]) -> dict[GridKey, "ShapeGrid"]:
    """Returns the grids of measured times."""
    found: dict[GridKey, dict[tuple[int, int], float]] = {}
    for each in linears:
        key = GridKey(each.scheme, each.batch, _has_kernel(each.scheme, each.columns))
        found.setdefault(key, {})[each.rows, each.columns] = each.milliseconds
    return {key: ShapeGrid(times) for key, times in found.items()}


class ShapeGrid:
    """Times of linears on a grid of shapes, interpolated bilinearly in the logarithms of shape and time.

    A shape that was measured has its own time. Above the grid, times grow with the number of weights; below it, the
    time is that of the smallest shape.

    Args:
        times: Milliseconds by `(rows, columns)`.
    """

    def __init__(self, times: Mapping[tuple[int, int], float]):
        self._times = dict(times)
        self._rows = sorted({rows for rows, _ in times})
        self._columns = sorted({columns for _, columns in times})
        self._largest = max(times, key=lambda shape: shape[0] * shape[1])

    def at(self, rows: int, columns: int) -> float:
        """Returns the time of one shape."""
        if (rows, columns) in self._times:
            return self._times[rows, columns]
        (low_row, high_row, row_share), growth = _bracket(self._rows, rows)
        (low_column, high_column, column_share), more = _bracket(self._columns, columns)
        low = _mixed(self._cell(low_row, low_column), self._cell(low_row, high_column), column_share)
        high = _mixed(self._cell(high_row, low_column), self._cell(high_row, high_column), column_share)
        return _mixed(low, high, row_share) * growth * more

    def left_out_errors(self) -> Iterator[float]:
        """Yields the relative error of each inner shape, interpolated along rows and along columns without it."""
        for (rows, columns), measured in self._times.items():
            for axis, own, at in ((self._rows, rows, True), (self._columns, columns, False)):
                along = [each for each in axis if ((each, columns) if at else (rows, each)) in self._times]
                place = along.index(own)
                if 0 < place < len(along) - 1:
                    below, above = along[place - 1], along[place + 1]
                    share = math.log(own / below) / math.log(above / below)
                    low, high = ((each, columns) if at else (rows, each) for each in (below, above))
                    yield abs(_mixed(self._times[low], self._times[high], share) / measured - 1)

    def _cell(self, rows: int, columns: int) -> float:
        if (rows, columns) in self._times:
            return self._times[rows, columns]
        # Too large to be measured: as long for each weight as the largest that was.
        largest = self._largest
        return self._times[largest] * rows * columns / (largest[0] * largest[1])


def interpolation_error(linears: Sequence[LinearTime]) -> InterpolationError | None:
    """Returns the errors of interpolation over all measured linears; None if no shape lies between others."""
    errors = [error for grid in shape_grids(linears).values() for error in grid.left_out_errors()]
    if not errors:
        return None
    return InterpolationError(median=statistics.median(errors), largest=max(errors), points=len(errors))


def clock_of(table: DeviceTable, batch: int = 1) -> Clock:
    """Returns a function of rows, columns, scheme and rank that gives the milliseconds of a linear.

    Args:
        table: The table.
        batch: Tokens decoded at once.
    """

    def clock(rows: int, columns: int, scheme: str | None, rank: int | None) -> float:
        return table.linear_ms(rows, columns, scheme, rank, batch)

    return clock


def read_table(path: str | Path) -> DeviceTable:
    """Reads a table.

    Raises:
        RefoldError: The file cannot be read, is damaged, or was written by another version.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise RefoldError(
            f"{path}: a readable device table is required ({error.strerror}); write one with "
            f"refold fit --measure-device {path}"
        ) from None
    try:
        return DeviceTable.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise RefoldError(
            f"{path}: a device table of format {TABLE_FORMAT} is required ({where}: {first['msg']}); measure again "
            f"with refold fit --measure-device {path}"
        ) from None


def describe_other_machine(table: DeviceTable, threads: int | None = None) -> str | None:
    """Returns a line about a table of another machine, engine or number of threads; None: it is of this one.

    Args:
        table: The table.
        threads: Threads that are used here; None: not compared.
    """
    machine, here = table.machine, processor_name()
    is_same = machine.engine == ENGINE and (machine.device != "cpu" or machine.processor == here)
    if is_same and threads in (None, machine.threads):
        return None
    used = here if threads is None else f"{here}, {threads} threads, engine {ENGINE}"
    return f"latency: measured on {machine.describe()} (this machine: {used}); it holds for that one"


def processor_name() -> str:
    """Returns the name of this machine's processor."""
    name = processor_field("model name") or platform.processor() or platform.machine()
    return f"{name} ({os.cpu_count()} processors)"


def _has_kernel(scheme: str | None, columns: int) -> bool:
    return columns % _kernel_columns(scheme) == 0


def _kernel_columns(scheme: str | None) -> int:
    """Returns the number of which columns are a multiple where the scheme's kernel takes them; see `nn/products.py`."""
    if scheme is None:
        return 1
    found = find_scheme(scheme)
    if found.bits == 8:
        return INT8_COLUMNS
    return found.group or 1 if found.bits == 4 else 1


def _bracket(axis: Sequence[int], size: int) -> tuple[tuple[int, int, float], float]:
    """Returns the neighbours of a size on an axis with its share of the way between them, and the growth beyond."""
    if size >= axis[-1]:
        return (axis[-1], axis[-1], 0.0), size / axis[-1]
    if size <= axis[0]:
        return (axis[0], axis[0], 0.0), 1.0
    place = bisect_right(axis, size)
    low, high = axis[place - 1], axis[place]
    return (low, high, math.log(size / low) / math.log(high / low)), 1.0


def _mixed(low: float, high: float, share: float) -> float:
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


def _along(times: Sequence[tuple[int, float]], at: int) -> float:
    """Interpolates linearly; beyond the ends with the slope of the last piece, but not below the smallest time."""
    if len(times) == 1:
        return times[0][1]
    place = min(max(1, bisect_right([each for each, _ in times], at)), len(times) - 1)
    (first, low), (second, high) = times[place - 1], times[place]
    return max(min(low for _, low in times), low + (high - low) * (at - first) / (second - first))
