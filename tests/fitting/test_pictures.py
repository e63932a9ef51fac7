"""Marks lie where their figures say, and labels keep clear of marks and of each other."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.fitting.pictures import (
    BOTTOM,
    CLEAR,
    DIGIT_WIDTH,
    FIT,
    HEIGHT,
    LEFT,
    TEXT_HEIGHT,
    TOP,
    WIDTH,
    Mark,
    Picture,
    _logarithmic,
    _place_labels,
    anchor,
    draw_pictures,
    method_names,
)
from refold.fitting.report import FitReport, MeasuredLoss, SingleMethod


def test_there_is_a_picture_of_each_limited_quantity_and_of_predictions(swept: FitReport, fitted: FitReport) -> None:
    assert [each.name for each in draw_pictures(swept)] == ["bytes", "milliseconds", "check"]
    assert [each.name for each in draw_pictures(fitted)] == ["bytes", "check"]
    assert draw_pictures(swept.model_copy(update={"points": ()})) == ()


def test_every_model_has_a_mark_at_its_cost_and_loss(swept: FitReport) -> None:
    picture = draw_pictures(swept)[0]
    found = {mark.anchor: mark for mark in picture.marks}
    singles = [single for point in swept.points for single in point.singles if single.made]
    assert len(found) == len(picture.marks) == len(swept.points) + len(singles)
    for number, point in enumerate(swept.points, 1):
        mark = found[anchor(number)]
        assert (mark.x, mark.y) == (pytest.approx(point.costs.bytes / swept.source_costs.bytes), point.loss)
        assert (mark.low, mark.high) == (point.measured["books"].loss, point.measured["encyclopedia"].loss)
    assert [mark.series for mark in picture.marks][-len(swept.points) :] == [FIT] * len(swept.points)
    assert method_names(swept) == ("int8", "int4", "low rank", "pruning", "width", "recursion")


def test_a_single_method_that_is_the_same_at_two_budgets_has_one_mark(swept: FitReport) -> None:
    first, second = swept.points[-2:]
    same = swept.model_copy(update={"points": (first, second.model_copy(update={"singles": first.singles}))})
    assert sum(mark.series == "int4" for mark in draw_pictures(same)[0].marks) == 1
    assert sum(mark.series == "int4" for mark in draw_pictures(swept)[0].marks) == 3


def test_a_single_method_without_a_time_has_no_mark_in_the_picture_of_time(swept: FitReport) -> None:
    def untimed(single: SingleMethod) -> SingleMethod:
        if single.made is None:
            return single
        costs = single.made.costs.model_copy(update={"milliseconds": 0.0})
        return single.model_copy(update={"made": single.made.model_copy(update={"costs": costs})})

    points = tuple(point.model_copy(update={"singles": tuple(map(untimed, point.singles))}) for point in swept.points)
    bytes_picture, time_picture, _ = draw_pictures(swept.model_copy(update={"points": points}))
    assert {mark.series for mark in time_picture.marks} == {FIT}
    assert len(bytes_picture.marks) > len(time_picture.marks) == len(points)


def is_on(picture: Picture, x: float, y: float) -> bool:
    return LEFT <= x <= WIDTH and TOP <= y <= HEIGHT - BOTTOM


def test_places_are_those_of_the_axes(swept: FitReport) -> None:
    for picture in draw_pictures(swept):
        x, y = picture.x_axis, picture.y_axis
        assert all(is_on(picture, x.place(mark.x), y.place(mark.y)) for mark in picture.marks)
        assert y.place(y.least) == HEIGHT - BOTTOM
        assert y.place(y.greatest) == TOP
        middle = math.sqrt(y.least * y.greatest)
        assert y.place(middle) == pytest.approx((HEIGHT - BOTTOM + TOP) / 2, abs=0.01)
        for tick in picture.x_ticks:
            share = float(tick.text.rstrip("%")) / (1 if x.is_log else 100)
            assert x.place(share) == pytest.approx(tick.place, abs=0.01)


def test_a_loss_below_the_noise_is_drawn_at_the_bottom_and_its_tick_says_so(fitted: FitReport) -> None:
    measured = {"books": MeasuredLoss(loss=-0.002), "encyclopedia": MeasuredLoss(loss=0.0)}
    point = fitted.points[0].model_copy(update={"measured": measured})
    picture = draw_pictures(fitted.model_copy(update={"points": (point,)}))[0]
    mark = picture.marks[-1]
    assert picture.y_axis.place(mark.y) == HEIGHT - BOTTOM
    assert picture.y_ticks[0].text.startswith("≤")
    assert not draw_pictures(fitted)[0].y_ticks[0].text.startswith("≤")


@settings(max_examples=50)
@given(st.lists(st.floats(-1.0, 100.0), min_size=1, max_size=12))
def test_a_logarithmic_axis_has_few_ticks_for_any_losses(values: list[float]) -> None:
    axis, ticks = _logarithmic(values, HEIGHT - BOTTOM, TOP)
    assert 1 <= len(ticks) <= 7
    assert axis.greatest >= max(values)
    assert axis.least < axis.greatest


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0.1, 1.0), st.floats(0.01, 10.0)), min_size=1, max_size=20))
def test_labels_meet_neither_marks_nor_each_other(places: list[tuple[float, float]]) -> None:
    marks = [Mark(FIT, str(i), f"recipe-{i}", "", x, y, y, y) for i, (x, y) in enumerate(places)]
    x_axis, _ = _logarithmic([0.1, 1.0], LEFT, WIDTH)
    y_axis, _ = _logarithmic([0.01, 10.0], HEIGHT - BOTTOM, TOP)
    labels = _place_labels(marks, x_axis, y_axis)
    assert labels
    boxes = []
    for label in labels:
        width = DIGIT_WIDTH * len(label.text)
        boxes.append((label.x - width / 2, label.y - TEXT_HEIGHT + 3, label.x + width / 2, label.y + 2))
    for one, two in itertools.combinations(boxes, 2):
        assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
    for (left, top, right, bottom), mark in itertools.product(boxes, marks):
        x, y = x_axis.place(mark.x), y_axis.place(mark.y)
        assert not (left - CLEAR + 2 < x < right + CLEAR - 2 and top - CLEAR + 2 < y < bottom + CLEAR - 2)
