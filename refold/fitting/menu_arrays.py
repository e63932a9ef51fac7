"""A menu as arrays: five numbers for each form, its scaled loss and its four costs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from refold.fitting.menu import TIE, MatrixForm, Menu, MenuMatrix, PartForm, PartMenu, TieForm, matrix_class

LOSS = 0
NUM_VALUES = 5
"""Numbers of a form: loss, bytes, cache, FLOPs, milliseconds."""
Vector = Float[np.ndarray, "5"]


@dataclass(frozen=True)
class MenuUnit:
    """One form of a part, one tie, or the embedding and the head: what is chosen as a whole, with its matrices.

    Attributes:
        part: The part; None for a tie, and for embedding and head.
        form: The form of the part or the tie; None for embedding and head.
        matrices: The matrices, of each of which one form is chosen.
        first: Index of the first matrix in `MenuArrays`.
    """

    part: PartMenu | None
    form: PartForm | TieForm | None
    matrices: tuple[MenuMatrix, ...]
    first: int

    @property
    def indices(self) -> range:
        """Indices of the matrices."""
        return range(self.first, self.first + len(self.matrices))


class MenuArrays:
    """The forms of a menu in arrays.

    Args:
        menu: The menu.
        without: Kinds of parts, classes of matrix forms, and `tie`, that may not be chosen. The first form of a part or
            of a matrix may always be chosen.

    Attributes:
        units: All units: embedding and head, then the forms of each part in their order, then the ties.
        unit_values: Loss and costs of each unit without its matrices `[units, 5]`.
        form_values: Loss and costs of each form of each matrix `[forms, 5]`.
        starts: Index of the first form of each matrix `[matrices]`.
        counts: Number of forms of each matrix `[matrices]`.
        unit_of: Index of the unit of each matrix `[matrices]`.
        fixed: Loss (0) and costs of everything that no choice changes.
    """

    def __init__(self, menu: Menu, without: Collection[str] = ()):
        self.menu, self.without = menu, frozenset(without)
        self.units: list[MenuUnit] = []
        self._forms: list[MatrixForm] = []
        self._counts: list[int] = []
        self._unit_of: list[int] = []
        unit_values: list[tuple[float, ...]] = []
        self._seen: dict[int, tuple[MenuMatrix, int]] = {}

        def add(
            part: PartMenu | None, form: PartForm | TieForm | None, matrices: Sequence[MenuMatrix], name: str
        ) -> None:
            kept = tuple(self._allowed(matrix) for matrix in matrices)
            self.units.append(MenuUnit(part, form, kept, len(self._counts)))
            unit_values.append((0.0,) * 5 if form is None else (self.scale(name) * form.loss, *form.costs))
            for matrix in kept:
                self._forms.extend(matrix.forms)
                self._counts.append(len(matrix.forms))
                self._unit_of.append(len(self.units) - 1)

        add(None, None, menu.outer, "")
        self.units_of_part: list[range] = []
        for part in menu.parts:
            begin = len(self.units)
            for index, form in enumerate(part.forms):
                if index == 0 or form.kind not in self.without:
                    add(part, form, form.matrices, form.kind)
            self.units_of_part.append(range(begin, len(self.units)))
        begin = len(self.units)
        for tie in () if TIE in self.without else menu.ties:
            add(None, tie, tie.matrices, TIE)
        self.tie_units = range(begin, len(self.units))
        self.unit_values: Float[np.ndarray, "units 5"] = np.array(unit_values)
        self.form_values = self._values_of_forms()
        self.counts: Int[np.ndarray, " matrices"] = np.array(self._counts, dtype=np.int64)
        self.starts: Int[np.ndarray, " matrices"] = np.cumsum(self.counts) - self.counts
        self.unit_of: Int[np.ndarray, " matrices"] = np.array(self._unit_of, dtype=np.int64)
        self.fixed: Vector = np.array((0.0, *menu.fixed))

    def scale(self, name: str) -> float:
        """Returns the factor on losses of a class."""
        return self.menu.scales.get(name, 1.0)

    def form(self, index: int) -> MatrixForm:
        """Returns a form of a matrix by its index in `form_values`."""
        return self._forms[index]

    def unit_totals(self, weights: Vector) -> Float[np.ndarray, " units"]:
        """Returns the least weighted value of each unit over the forms of its matrices."""
        totals = self.unit_values @ weights
        if len(self.counts):
            least = np.minimum.reduceat(self.form_values @ weights, self.starts)
            totals = totals + np.bincount(self.unit_of, weights=least, minlength=len(totals))
        return totals

    def _values_of_forms(self) -> Float[np.ndarray, "forms 5"]:
        scales: Mapping[str, float] = self.menu.scales
        if not self._forms:
            return np.zeros((0, NUM_VALUES))
        values = np.array([(each.loss, *each.costs) for each in self._forms])
        if scales:
            values[:, LOSS] *= [scales.get(matrix_class(each), 1.0) for each in self._forms]
        return values

    def _allowed(self, matrix: MenuMatrix) -> MenuMatrix:
        if not self.without:
            return matrix
        # Parts share their matrices, which are the same objects.
        if id(matrix) not in self._seen:
            first, *others = matrix.forms
            forms = (first, *(each for each in others if matrix_class(each) not in self.without))
            made = matrix if len(forms) == len(matrix.forms) else matrix.model_copy(update={"forms": forms})
            self._seen[id(matrix)] = (made, id(matrix))
        return self._seen[id(matrix)][0]


def least_forms(
    values: Float[np.ndarray, " forms"], starts: Int[np.ndarray, " matrices"], counts: Int[np.ndarray, " matrices"]
) -> Int[np.ndarray, " matrices"]:
    """Returns the index of the first form with the least value of each matrix."""
    if not len(starts):
        return np.zeros(0, dtype=np.int64)
    least = np.minimum.reduceat(values, starts)
    hits = np.flatnonzero(values == np.repeat(least, counts))
    return hits[np.searchsorted(hits, starts)]
