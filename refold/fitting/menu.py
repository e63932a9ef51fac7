"""The menu of a fit: every way to keep each part and each matrix of a source, with its predicted loss and its cost."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from pydantic import Field

from refold.blueprint.integers import SchemeName
from refold.blueprint.schema import Pool
from refold.families.arch import Frozen

Outer = Literal["embedding", "head"]
QUANTITIES = ("bytes", "cache", "flops", "milliseconds")
"""The quantities that a budget can limit, in the order of `Costs`."""
TIE, PAIRS = "tie", "pairs"
"""Classes of the losses of ties and of pairs."""


class Costs(NamedTuple):
    """Costs that add up over the parts of a model.

    Attributes:
        bytes: Stored bytes.
        cache: Bytes of cache and state of one sequence at the context of the fit.
        flops: FLOPs of the token that follows this context.
        milliseconds: Time of one decoded token on the named device; 0 without a table of the device.
    """

    bytes: float = 0.0
    cache: float = 0.0
    flops: float = 0.0
    milliseconds: float = 0.0

    def plus(self, other: "Costs") -> "Costs":
        """Returns the sum of two costs."""
        return Costs(*(one + two for one, two in zip(self, other, strict=True)))


class MatrixForm(Frozen):
    """One way to store a matrix: whole or as two factors, in floats or integers."""

    rank: int | None
    """Rank of the two factors; None: the whole matrix."""
    scheme: SchemeName | None
    """Scheme of the integers; None: floats of two bytes."""
    loss: float
    """Predicted loss in nats per token, against the matrix whole and in floats."""
    costs: Costs


class MenuMatrix(Frozen):
    """One matrix of a part, of which one form is chosen."""

    name: str
    """Name of the linear, such as `q_proj`; `embedding` or `head` outside of the stack."""
    rows: int = 0
    """Outputs in this form of the part, from which times are computed; 0: not given."""
    columns: int = 0
    """Inputs likewise."""
    forms: tuple[MatrixForm, ...] = Field(min_length=1)


class PartForm(Frozen):
    """One way to keep a part: whole, narrower, dropped, replaced."""

    kind: str
    """Name of the kind of choice that offers the form, in `refold.fitting.kinds.registry`."""
    setting: dict[str, int | str] = Field(default_factory=dict)
    """The values from which the kind writes the form into a recipe, such as `{"neurons": 640}`."""
    loss: float
    """Predicted loss in nats per token, with all matrices of the form whole and in floats."""
    costs: Costs
    """Costs of the form beside those of its matrices: norms, biases, cache, FLOPs of attention."""
    matrices: tuple[MenuMatrix, ...] = ()
    needs: Literal["keys", "projection"] | None = None
    """What the form needs of the stack before it. `keys`: the mixer of the layer before in its first form.
    `projection`: the part just before, stored in some form of the source's type and not tied."""

    @property
    def leaves(self) -> bool:
        """Whether nothing of the part is stored (dropped, or folded into the part before), so that pairs count."""
        return not self.matrices

    @property
    def is_native(self) -> bool:
        """Whether the part is of the source's type: another mixer's output projection takes no linear map."""
        return self.setting.get("type", "attention") == "attention"


class PartMenu(Frozen):
    """The forms of one part of the source; the first is the whole part."""

    layer: int
    pool: Pool
    forms: tuple[PartForm, ...] = Field(min_length=1)


class TieForm(Frozen):
    """Two layers that use one stored part, instead of a form for each."""

    pool: Pool
    layers: tuple[int, int]
    """The tied layers; the second follows the first."""
    loss: float
    costs: Costs
    """Costs beside those of the matrices, of both layers together."""
    matrices: tuple[MenuMatrix, ...]
    """The shared matrices; FLOPs and milliseconds count both layers."""


class PartPair(Frozen):
    """An additional loss where two parts that follow each other have both left the model (dropped or replaced).

    Additive losses are too low there: the second part cannot make up for the first.
    """

    first: tuple[int, Pool]
    second: tuple[int, Pool]
    loss: float


class Menu(Frozen):
    """All choices of a fit, and the costs that no choice changes."""

    parts: tuple[PartMenu, ...]
    """In the order of execution: mixer and MLP of the first layer, of the second, ..."""
    outer: tuple[MenuMatrix, ...]
    """The embedding, and the head if it is not the embedding."""
    ties: tuple[TieForm, ...] = ()
    pairs: tuple[PartPair, ...] = ()
    fixed: Costs
    """Costs of everything that no choice changes."""
    source: Costs
    """Costs of the source at two bytes a number, whatever it is stored in: 100% of every budget."""
    context: int
    """Tokens at which cache and FLOPs are counted."""
    scales: dict[str, float] = Field(default_factory=dict)
    """Factor on predicted losses by class of choice, found by looking at candidates; default 1. Classes: the kind of a
    part's form, `tie`, `pairs`, and those of `matrix_class`."""


class ChosenPart(NamedTuple):
    """The chosen form of one part, or its place in a tie."""

    layer: int
    pool: Pool
    form: PartForm
    matrices: Mapping[str, MatrixForm]


class FitChoice(NamedTuple):
    """One choice from a menu.

    Attributes:
        parts: The chosen form of every part that is not tied.
        ties: The chosen ties, each with the forms of its matrices.
        outer: Form of the embedding and of the head, by name.
        loss: Predicted loss, scaled and with pairs.
        losses: The same by class of choice.
        costs: All costs, fixed ones included.
    """

    parts: tuple[ChosenPart, ...]
    ties: tuple[tuple[TieForm, Mapping[str, MatrixForm]], ...]
    outer: Mapping[str, MatrixForm]
    loss: float
    losses: Mapping[str, float]
    costs: Costs

    @property
    def key(self) -> tuple[object, ...]:
        """The chosen forms; two choices with the same key are one."""

        def stored(matrices: Mapping[str, MatrixForm]) -> tuple[object, ...]:
            return tuple((name, form.rank, form.scheme) for name, form in matrices.items())

        parts = tuple(
            (part.layer, part.pool, part.form.kind, tuple(sorted(part.form.setting.items())), stored(part.matrices))
            for part in self.parts
        )
        return parts, tuple((tie.pool, tie.layers, stored(forms)) for tie, forms in self.ties), stored(self.outer)


def matrix_class(form: MatrixForm) -> str:
    """Returns the class of a matrix form's loss: `none`, `bits`, `rank`, or `rank and bits`."""
    if form.rank is None:
        return "none" if form.scheme is None else "bits"
    return "rank" if form.scheme is None else "rank and bits"
