"""A claim of a paper as data: its statement, and the measurements that decide about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from refold.claims.record import FindingRecord
from refold.planning.plan import Draft
from refold.recipe.load import RecipeLike
from refold.sources.source_model import SourceModel


class ClaimNotRun(Exception):
    """A claim cannot be measured at this scale, or with the data given; the message says why."""


Twin = Callable[[SourceModel, Draft], Draft]
"""Function from the source and the plan of a recipe to the plan of a rival, such as the same from scratch."""
RecipeMaker = Callable[[SourceModel, int], RecipeLike]
"""Function from the source and a seed to a recipe."""


class TriedRates(NamedTuple):
    """Learning rates for a kind of start, at a hidden size of 256; other sizes get them scaled.

    A scale tries three of them: the first three where an optimizer step has few tokens, else the last three. The number
    is the same for all kinds, so that all arms train on the same tokens.
    """

    lowest: float
    low: float
    high: float
    highest: float


NEAR = TriedRates(7e-5, 2e-4, 5e-4, 1e-3)
"""For starts within a few hundredths of a nat from the source."""
FAR = TriedRates(2.5e-4, 7e-4, 2e-3, 5e-3)
"""For starts that carry the source's weights and lose much, such as folds."""
FRESH = TriedRates(7e-4, 2e-3, 5e-3, 1e-2)
"""For models from scratch."""


@dataclass(frozen=True)
class ClaimArm:
    """One model of a claim: how it is made, and how it is trained. Arms of equal content are trained once.

    Attributes:
        name: Name on the page.
        recipe: The recipe, or a function that makes it from the source and the seed.
        twin: Turns the recipe's plan into a rival's; None: the plan stays.
        heal: Training stages as in a recipe's `heal`, each with `share`, its part of the tokens; empty: no training.
        base: The arm whose trained model this one goes on to train; None: it begins with the conversion.
        rates: Learning rates to try.
        tokens: Training tokens, as a share of those of the scale.
        draws: Number of models that the recipe draws, such as by layers to drop, one for each seed from 0 on; 0: the
            seeds of the scale.
        is_followed: Whether the loss on validation text is measured during training.
    """

    name: str
    recipe: RecipeLike | RecipeMaker
    twin: Twin | None = None
    heal: Sequence[Mapping[str, Any]] = ()
    base: "ClaimArm | None" = None
    rates: TriedRates = FAR
    tokens: float = 1.0
    draws: int = 0
    is_followed: bool = False

    @property
    def bases(self) -> tuple["ClaimArm", ...]:
        """The arms that are trained before this one, first to last."""
        return () if self.base is None else (*self.base.bases, self.base)


@dataclass(frozen=True)
class Reading:
    """The loss of an arm at full depth, or at one of its exits.

    Attributes:
        arm: The arm.
        exit: Index of the exit; None: the full depth.
    """

    arm: ClaimArm
    exit: int | None = None

    @property
    def name(self) -> str:
        """Name on the page."""
        return self.arm.name if self.exit is None else f"{self.arm.name}, exit {self.exit + 1}"


@runtime_checkable
class ClaimMeasurement(Protocol):
    """One comparison of a claim, that can be found to hold, to fail, or neither."""

    @property
    def arms(self) -> tuple[ClaimArm, ...]:
        """The arms that must be made first."""
        ...

    def find(self, bench: Any) -> Sequence[FindingRecord]:
        """Measures the comparison in every domain.

        Raises:
            ClaimNotRun: It cannot be measured.
        """
        ...


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
        name: Name for `--only`.
        paper: Short name of the paper, with its arXiv number.
        statement: The paper's statement in our words.
        figures: The paper's figures, with their table.
        measurements: All of them must hold for the claim to be reproduced.
        note: How our measurement differs from the paper's.
    """

    name: str
    paper: str
    statement: str
    figures: str
    measurements: tuple[ClaimMeasurement, ...]
    note: str = ""

    @property
    def arms(self) -> tuple[ClaimArm, ...]:
        """All arms, each after the arm that it goes on from."""
        found: dict[int, ClaimArm] = {}
        for measurement in self.measurements:
            for arm in measurement.arms:
                for each in (*arm.bases, arm):
                    found.setdefault(id(each), each)
        return tuple(found.values())
