"""A made-up report of a sweep, so that pages and tables are tested without a fit."""

import pytest

from refold.fitting.report import (
    BudgetRecord,
    ClassShare,
    CostFigures,
    FitCandidate,
    FitPoint,
    FitReport,
    FitText,
    FloorShare,
    HeldOutText,
    MeasuredLoss,
    Quantity,
    SingleMethod,
)

SOURCE = CostFigures(bytes=269e6, cache=94e6, flops=620e6, milliseconds=12.0)
TEXTS = ("books", "encyclopedia")
SINGLES = {"int8": 0.53, "int4": 0.34, "low rank": 0.2, "pruning": 0.1, "width": 0.1, "recursion": 0.1}
"""Smallest share of the bytes that each method reaches."""
HARM = {"int8": 0.001, "int4": 1.3, "low rank": 3.0, "pruning": 6.0, "width": 4.0, "recursion": 40.0}
"""Loss of each method over the fit's at the same budget."""


def candidate(name: str, share: float, loss: float, predicted: float | None = None) -> dict:
    costs = {"bytes": share, "cache": min(1.0, share + 0.3), "flops": min(1.0, share + 0.5), "milliseconds": share}
    return {
        "name": name,
        "summary": f"{name}: int3 in 98 matrices, int4 in 60; width in 12 MLPs",
        "recipe": {
            "quantise": {"to": "int4", "layers": {"q_proj": ["int3"] * 29 + ["float"], "down_proj": ["int4"] * 30}},
            "width": {"mlp": [1024, 1536] * 15},
        },
        "comments": (f"{name} of a made-up source",),
        "costs": CostFigures(**{key: value * getattr(SOURCE, key) for key, value in costs.items()}),
        "predicted": predicted,
        "measured": {text: MeasuredLoss(loss=loss * (1 + 0.3 * i), error=loss / 9) for i, text in enumerate(TEXTS)},
    }


def make_point(share: float, limits: tuple[Quantity, ...] = ("bytes",)) -> FitPoint:
    loss = 0.002 / share**4
    singles = [
        SingleMethod(name=name, reason=f"at least {least:.0%} of the bytes")
        if share < least
        else SingleMethod(name=name, made=FitCandidate(**candidate(name, share, loss * (1 + HARM[name]))))
        for name, least in SINGLES.items()
    ]
    return FitPoint(
        **candidate("fit", share * 0.995, loss, loss * 0.8),
        budget=BudgetRecord(text=f"bytes {share:.0%}", limits={name: share * getattr(SOURCE, name) for name in limits}),
        classes=(
            ClassShare(name="bits", number=158, loss=loss * 0.6, saved=CostFigures(bytes=150e6, cache=0, flops=0)),
            ClassShare(name="width", number=12, loss=loss * 0.2, saved=CostFigures(bytes=9e6, cache=0, flops=60e6)),
        ),
        singles=tuple(singles),
        runner_up=FitCandidate(**candidate("without width", share, loss * 1.1, loss)),
        folder=None,
    )


def make_report(shares: tuple[float, ...], limits: tuple[Quantity, ...] = ("bytes",)) -> FitReport:
    return FitReport(
        source="models/smol",
        source_costs=SOURCE,
        text=(FitText(name="books", weight=0.5, tokens=8192), FitText(name="docs", weight=0.5, tokens=8192)),
        held_out=tuple(HeldOutText(name=name, tokens=16_384, loss=3.2) for name in TEXTS),
        context=8192,
        floor=(FloorShare(name="embedding in int2", bytes=11e6), FloorShare(name="norms", bytes=1e5)),
        points=tuple(make_point(share, limits) for share in shares),
        seconds={"measuring": 200.0, "choosing": 2.0, "looking": 90.0},
        versions={"refold": "0"},
    )


@pytest.fixture
def fitted() -> FitReport:
    """A fit of one budget."""
    return make_report((0.35,))


@pytest.fixture
def swept() -> FitReport:
    """A sweep over six budgets, the last two close to each other."""
    return make_report((0.2, 0.25, 0.3, 0.4, 0.6, 0.61), ("bytes", "milliseconds"))
