"""The report of a fit from its search: points, classes of choice, runner-up, single methods, floor."""

from collections.abc import Mapping, Sequence

from refold.checkpoint.provenance import Stage
from refold.fitting.budget import Budget, Limits
from refold.fitting.floor import find_floor
from refold.fitting.job import FitJob
from refold.fitting.look import TextLoss
from refold.fitting.menu import QUANTITIES, Menu
from refold.fitting.report import (
    BudgetRecord,
    CostFigures,
    FitCandidate,
    FitPoint,
    FitReport,
    FloorShare,
    HeldOutText,
    MeasuredLoss,
    Quantity,
    SingleMethod,
)
from refold.fitting.search import Tried
from refold.fitting.single_methods import Single
from refold.fitting.summary import share_classes, summarise


class ReportParts:
    """Makes the parts of a fit's report.

    Args:
        job: The fit.
        menu: The menu as it was measured.
        context: Tokens at which cache and FLOPs are counted.
    """

    def __init__(self, job: FitJob, menu: Menu, context: int):
        self._job, self._menu, self._context = job, menu, context

    def point(self, budget: Budget, limits: Limits, found: Sequence[Tried], singles: Sequence[Single]) -> FitPoint:
        """Returns the point of one budget.

        Args:
            budget: The budget.
            limits: Its limits as amounts.
            found: Candidates, the chosen one first, measured on the text of the report.
            singles: Single methods at this budget.
        """
        best, others = found[0], found[1:]
        candidate = self._candidate(budget.describe(), best)
        fields = {name: getattr(candidate, name) for name in FitCandidate.model_fields}
        given: dict[Quantity, float] = {}
        for quantity in QUANTITIES:
            limit = getattr(limits, quantity)
            given |= {} if limit is None else {quantity: limit}
        return FitPoint(
            **fields,
            budget=BudgetRecord(text=budget.describe(), limits=given, max_loss=budget.max_loss),
            classes=share_classes(best.choice, self._menu),
            singles=tuple(self._single(each) for each in singles),
            runner_up=self._candidate(others[0].looked.name, others[0]) if others else None,
        )

    def _candidate(self, name: str, tried: Tried) -> FitCandidate:
        looked = tried.looked
        measured, healed = (looked, None) if tried.unhealed is None else (tried.unhealed, looked)
        return FitCandidate(
            name=name,
            summary=summarise(tried.choice),
            recipe=dict(looked.recipe),
            comments=(f"Chosen by `refold fit` for {name}.",),
            costs=CostFigures.of(looked.costs),
            predicted=tried.choice.loss,
            measured=_losses(measured.losses),
            healed={} if healed is None else _losses(healed.losses),
        )

    def _single(self, single: Single) -> SingleMethod:
        if single.looked is None:
            return SingleMethod(name=single.name, reason=single.reason)
        made = FitCandidate(
            name=single.name,
            summary=single.name,
            recipe=dict(single.looked.recipe),
            costs=CostFigures.of(single.looked.costs),
            predicted=None,
            measured=_losses(single.looked.losses),
        )
        return SingleMethod(name=single.name, made=made)

    def report(self, points: Sequence[FitPoint], measured: Mapping[str, TextLoss], device: str | None) -> FitReport:
        """Returns the whole report.

        Args:
            points: The point of every budget.
            measured: A measurement on the text of the report, for the source's losses.
            device: Device whose table gave the milliseconds.
        """
        job = self._job
        return FitReport(
            source=job.source.where,
            source_costs=CostFigures.of(self._menu.source),
            text=job.texts(),
            held_out=tuple(
                HeldOutText(name=name, tokens=each.tokens, loss=each.source) for name, each in measured.items()
            ),
            context=self._context,
            engine=job.options.engine,
            device=device,
            floor=tuple(FloorShare(name=name, bytes=size) for name, size in find_floor(self._menu).parts.items()),
            points=tuple(points),
            seconds={name: round(each, 1) for name, each in job.watch.seconds.items()},
            notes=tuple(job.notes),
            versions=Stage(stage="fit").versions,
        )


def _losses(losses: Mapping[str, TextLoss]) -> dict[str, MeasuredLoss]:
    return {
        name: MeasuredLoss(loss=each.loss, error=each.error, divergence=max(0.0, each.divergence))
        for name, each in losses.items()
    }
