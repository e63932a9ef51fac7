"""Reports of fits are written, read again and refused by name; figures of a report follow from its parts."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from refold.errors import FolderError, RefoldError
from refold.fitting.budget import parse_budget
from refold.fitting.menu import Costs
from refold.fitting.report import (
    BudgetRecord,
    CostFigures,
    FitReport,
    MeasuredLoss,
    SingleMethod,
    mean_loss,
    read_report,
)


def test_a_written_report_is_read_back_equal(swept: FitReport, tmp_path: Path) -> None:
    path = swept.write(tmp_path)
    assert path == tmp_path / "front.json"
    assert read_report(tmp_path) == swept
    assert read_report(path) == swept
    assert read_report(path) != swept.model_copy(update={"context": 1})


def test_an_older_report_is_replaced_only_when_asked_and_no_other_file_is(swept: FitReport, tmp_path: Path) -> None:
    path = swept.write(tmp_path / "front.json")
    with pytest.raises(FolderError, match="--overwrite"):
        swept.write(path)
    swept.write(path, overwrite=True)
    path.write_text('{"mine": 1}')
    with pytest.raises(FolderError, match="a report of `fit` is required to be overwritten"):
        swept.write(path, overwrite=True)


def test_a_file_that_is_no_report_is_refused_by_name(swept: FitReport, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"front\.json: a report of `fit` is required \(No such file"):
        read_report(tmp_path)
    newer = swept.write(tmp_path / "newer.json")
    newer.write_text(newer.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(FolderError, match=r"format 1 is required \(format: .*fit again"):
        read_report(newer)


def test_a_single_method_has_a_model_or_a_reason() -> None:
    with pytest.raises(ValidationError, match="single int8: exactly one of made and reason is required"):
        SingleMethod(name="int8")
    with pytest.raises(ValidationError, match="Input should be"):
        MeasuredLoss(loss="much")  # pyright: ignore[reportArgumentType]


def test_costs_are_shares_of_the_source() -> None:
    made, source = CostFigures.of(Costs(30.0, 5.0, 8.0, 0.0)), CostFigures.of(Costs(120.0, 10.0, 8.0, 0.0))
    assert [made.share(name, source) for name in ("bytes", "cache", "flops", "milliseconds")] == [0.25, 0.5, 1.0, 0.0]


def test_the_delivered_loss_is_the_healed_one_and_else_the_measured_or_predicted(fitted: FitReport) -> None:
    point = fitted.points[0]
    assert point.loss == pytest.approx(mean_loss(point.measured))
    healed = {name: MeasuredLoss(loss=0.01) for name in point.measured}
    assert point.model_copy(update={"healed": healed}).loss == pytest.approx(0.01)
    assert point.model_copy(update={"measured": {}}).loss == point.predicted


@pytest.mark.parametrize(
    ("predicted", "measured", "agrees"),
    [(0.1, 0.13, True), (0.1, 0.15, False), (0.001, 0.0105, True), (0.0, -0.005, True), (None, 0.1, None)],
)
def test_a_prediction_agrees_within_a_share_or_a_hundredth(
    fitted: FitReport, predicted: float | None, measured: float, agrees: bool | None
) -> None:
    losses = {"books": MeasuredLoss(loss=measured)}
    point = fitted.points[0].model_copy(update={"predicted": predicted, "measured": losses})
    assert point.agrees is agrees
    assert point.model_copy(update={"measured": {}}).agrees is None


def test_a_recipes_text_has_its_comments_and_is_the_recipe(fitted: FitReport) -> None:
    text = fitted.points[0].recipe_text()
    assert text.startswith("# fit of a made-up source\n")
    assert yaml.safe_load(text) == fitted.points[0].recipe


def test_a_budget_is_recorded_in_amounts_of_the_source() -> None:
    budget = parse_budget(bytes="35%", cache="20MB", max_loss=0.5, context=64)
    record = BudgetRecord.of(budget, Costs(200e6, 80e6, 3e9, 0.0))
    assert record.limits == {"bytes": pytest.approx(70e6), "cache": 20e6}
    assert record.max_loss == 0.5
    assert record.text == "bytes 35%, cache 20MB at 64 tokens, loss at most 0.5 nats per token"
    with pytest.raises(RefoldError, match="there is nothing to do"):
        BudgetRecord.of(parse_budget(bytes="100%"), Costs(200e6, 80e6, 3e9, 0.0))


def test_limits_that_all_budgets_share_are_named_once(swept: FitReport, fitted: FitReport) -> None:
    def rename(text: str, number: int) -> FitReport:
        points = [
            point.model_copy(update={"budget": BudgetRecord(text=f"{point.budget.text}, {text} at 8,192 tokens")})
            for point in swept.points[:number]
        ]
        return swept.model_copy(update={"points": tuple(points)})

    assert rename("cache 40%", 3).shared_budget == "cache 40% at 8,192 tokens"
    assert rename("cache 40%", 3).budget_names == ("bytes 20%", "bytes 25%", "bytes 30%")
    assert (swept.shared_budget, fitted.shared_budget) == ("", "")
    assert rename("cache 40%", 1).budget_names == ("bytes 20%, cache 40% at 8,192 tokens",)
    assert swept.model_copy(update={"points": ()}).budget_names == ()


def test_the_pictures_are_of_the_limited_quantities(swept: FitReport) -> None:
    assert swept.limited == ("bytes", "milliseconds")
    point = swept.points[0]
    free = point.model_copy(update={"budget": point.budget.model_copy(update={"limits": {}, "max_loss": 0.1})})
    assert swept.model_copy(update={"points": (free,)}).limited == ("bytes",)
