"""The report of a fit, written as `front.json`: models that meet a budget, and single methods beside them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from refold.checkpoint.atomic_file import require_free, write_json
from refold.errors import FolderError
from refold.families.arch import Frozen
from refold.fitting.budget import Budget
from refold.fitting.menu import Costs

REPORT_NAME = "front.json"
Quantity = Literal["bytes", "cache", "flops", "milliseconds"]
QUANTITY_NAMES: Mapping[Quantity, str] = {"bytes": "bytes", "cache": "cache", "flops": "FLOPs", "milliseconds": "time"}
"""Names of the quantities in sentences and tables, in the order of `Costs`."""
STATED_RATIO, STATED_NATS = 0.3, 0.01
"""A prediction agrees with its measurement within this share of the measured divergence, or within so many nats."""


class CostFigures(Frozen):
    """Costs of a model, by name; units as in `Costs`."""

    bytes: float
    cache: float
    flops: float
    milliseconds: float = 0.0
    """0: no table of a device was given."""

    @classmethod
    def of(cls, costs: Costs) -> "CostFigures":
        """Returns the figures of costs."""
        return cls(**costs._asdict())

    def share(self, quantity: Quantity, source: "CostFigures") -> float:
        """Returns a cost as a share of the source's; 0 if the source has none of it."""
        whole = getattr(source, quantity)
        return getattr(self, quantity) / whole if whole else 0.0


class MeasuredLoss(Frozen):
    """Loss on one held-out text, in nats per token over the source."""

    loss: float
    error: float | None = Field(default=None, ge=0)
    """Standard error, documents paired; None with fewer than two documents."""
    divergence: float | None = Field(default=None, ge=0)
    """KL(source || model) in nats per token; the predictions estimate it."""


class BudgetRecord(Frozen):
    """The budget that a point met."""

    text: str
    """The budget as the user wrote it."""
    limits: dict[Quantity, float] = Field(default_factory=dict)
    """Upper limits in the units of `Costs`."""
    max_loss: float | None = None
    """Upper limit of the measured loss in nats per token; the cheapest candidate within it was chosen."""

    @classmethod
    def of(cls, budget: Budget, source: Costs) -> "BudgetRecord":
        """Returns the record of a budget for a source with these costs.

        Raises:
            RefoldError: The errors of `Budget.limits`.
        """
        amounts = budget.limits(source)
        limits: dict[Quantity, float] = {
            name: limit for name in QUANTITY_NAMES if (limit := getattr(amounts, name)) is not None
        }
        return cls(text=budget.describe(), limits=limits, max_loss=amounts.loss)


class ClassShare(Frozen):
    """The effect of one class of choice: `bits`, `rank`, `rank and bits`, a kind of part, or `tie`."""

    name: str
    number: int
    """Number of matrices, parts or ties of the class."""
    loss: float
    """Predicted loss in nats per token."""
    saved: CostFigures
    """Costs that the class saved."""


class FitCandidate(Frozen):
    """A model that was predicted, and measured unless there was no held-out text."""

    name: str
    summary: str
    """The choices in one sentence."""
    recipe: dict[str, Any]
    comments: tuple[str, ...] = ()
    """Paragraphs above the recipe: description and budget."""
    costs: CostFigures
    predicted: float | None
    """Predicted loss in nats per token, unhealed, from before the candidate was measured; None for a recipe that is not
    from the menu."""
    measured: dict[str, MeasuredLoss] = Field(default_factory=dict)
    """Loss before healing, by name of the held-out text."""
    healed: dict[str, MeasuredLoss] = Field(default_factory=dict)
    """Loss after healing, by name of the held-out text; empty without healing."""

    @property
    def losses(self) -> Mapping[str, MeasuredLoss]:
        """Returns the measured losses of the model as it is delivered: healed if it was healed."""
        return self.healed or self.measured

    @property
    def loss(self) -> float | None:
        """Returns the mean of `losses` over the held-out texts; without them the predicted loss."""
        return mean_loss(self.losses) if self.losses else self.predicted

    def recipe_text(self) -> str:
        """Returns the recipe as YAML with its comments."""
        # Imported here, because kinds of choice need torch and a report does not.
        from refold.fitting.write_recipe import recipe_text

        return recipe_text(self.recipe, self.comments)


class SingleMethod(Frozen):
    """The best model of one method alone at the budget of a point, or the reason why there is none."""

    name: str
    """Name of the method, such as `int4` or `pruning`."""
    made: FitCandidate | None = None
    reason: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "SingleMethod":
        if (self.made is None) == (self.reason is None):
            raise ValueError(f"single {self.name}: exactly one of made and reason is required")
        return self


class FitPoint(FitCandidate):
    """The chosen model of one budget."""

    budget: BudgetRecord
    classes: tuple[ClassShare, ...]
    singles: tuple[SingleMethod, ...] = ()
    runner_up: FitCandidate | None = None
    folder: str | None = None
    """Folder of the model; None if it was only measured."""

    @property
    def agrees(self) -> bool | None:
        """Returns whether prediction and measurement agree within the stated error; None where one is absent."""
        if self.predicted is None or not self.measured:
            return None
        measured = mean_divergence(self.measured)
        return abs(self.predicted - measured) <= max(STATED_RATIO * abs(measured), STATED_NATS)


class FitText(Frozen):
    """One kind of calibration text."""

    name: str
    weight: float
    """Share of the mixture."""
    tokens: int


class HeldOutText(Frozen):
    """One held-out text."""

    name: str
    tokens: int
    loss: float
    """The source's loss in nats per token."""


class FloorShare(Frozen):
    """A part of the bytes that no choice can lower further."""

    name: str
    bytes: float


class FitReport(Frozen):
    """The result of a fit, or of a sweep over budgets."""

    format: Literal[1] = 1
    source: str
    """Folder or hub id of the source."""
    source_costs: CostFigures
    """Costs of the source at two bytes a number, whatever it is stored in: 100% of every budget."""
    text: tuple[FitText, ...]
    held_out: tuple[HeldOutText, ...] = ()
    context: int
    """Tokens at which cache and FLOPs are counted."""
    engine: str | None = None
    """Engine that every choice had to fit; None: any."""
    device: str | None = None
    """Device whose table gave the milliseconds."""
    floor: tuple[FloorShare, ...] = ()
    points: tuple[FitPoint, ...] = ()
    """The chosen model of every budget; none in a dry run."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Seconds of each stage; estimated in a dry run."""
    is_forecast: bool = False
    """Whether this is the forecast of a dry run."""
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def limited(self) -> tuple[Quantity, ...]:
        """Returns the quantities that a budget limits, in the order of `Costs`; `bytes` if only the loss is limited."""
        found = {name for point in self.points for name in point.budget.limits}
        return tuple(name for name in QUANTITY_NAMES if name in found) or ("bytes",)

    @property
    def shared_budget(self) -> str:
        """Returns the limits that all of several budgets have in common, as written; empty for one budget."""
        written = [point.budget.text.split(", ") for point in self.points]
        return ", ".join(each for each in written[0] if all(each in other for other in written)) if written[1:] else ""

    @property
    def budget_names(self) -> tuple[str, ...]:
        """Returns the budget of each point as written, without the shared limits."""
        shared = self.shared_budget.split(", ")
        kept = [[each for each in point.budget.text.split(", ") if each not in shared] for point in self.points]
        return tuple(", ".join(each) or point.budget.text for each, point in zip(kept, self.points, strict=True))

    def write(self, path: str | Path, overwrite: bool = False) -> Path:
        """Writes the report to a file, atomically, and returns the file's path.

        Args:
            path: The file, or a folder for `front.json`.
            overwrite: Replace an older report; other files are never replaced.

        Raises:
            FolderError: The file exists, or cannot be written.
        """
        path = Path(path)
        path = path / REPORT_NAME if path.is_dir() else path
        require_free(path, "report of `fit`", _is_report, overwrite)
        write_json(path, self.model_dump(mode="json"))
        return path


def mean_loss(losses: Mapping[str, MeasuredLoss]) -> float:
    """Returns the mean loss over at least one held-out text, each with the same weight."""
    return math.fsum(each.loss for each in losses.values()) / len(losses)


def mean_divergence(losses: Mapping[str, MeasuredLoss]) -> float:
    """Returns the mean divergence from the source, with which predictions are compared.

    A prediction estimates how far a model moves from its source. On the true text such a move may also help, and a
    difference of losses has far more noise than a divergence. Where no divergence was measured the loss stands in.
    """
    found = [each.loss if each.divergence is None else each.divergence for each in losses.values()]
    return math.fsum(found) / len(found)


def read_report(path: str | Path) -> FitReport:
    """Reads the report of a fit, or `front.json` in a folder.

    Raises:
        FolderError: The file does not exist, or it is no report of this format.
    """
    path = Path(path)
    path = path / REPORT_NAME if path.is_dir() else path
    try:
        return FitReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise FolderError(
            f"{path}: a report of `fit` is required ({error.strerror}); make one with `refold fit`"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise FolderError(
            f"{path}: a report of `fit` of format 1 is required ({where}: {first['msg']}); fit again"
        ) from None


def _is_report(path: Path) -> bool:
    try:
        read_report(path)
    except FolderError:
        return False
    return True
