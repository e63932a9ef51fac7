"""Searches whose candidates are measured by a made-up rule instead of a conversion."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refold.errors import RefoldError
from refold.fitting.budget import Limits
from refold.fitting.choose import cheapest
from refold.fitting.look import Looked, TextLoss
from refold.fitting.menu import Costs, FitChoice, MatrixForm, Menu, MenuMatrix
from refold.fitting.search import Search
from refold.planning.build import identity_blueprint

SIZES = {None: (0.0, 160), "int8": (0.01, 80), "int4": (0.04, 40), "int2": (0.2, 20)}
Look = Callable[[FitChoice, str], Looked]


@pytest.fixture
def arch(make_arch: Callable[..., Any]) -> Any:
    return make_arch(1)


def make_menu() -> Menu:
    forms = tuple(
        MatrixForm(rank=None, scheme=scheme, loss=loss, costs=Costs(size)) for scheme, (loss, size) in SIZES.items()
    )
    return Menu(
        parts=(), outer=(MenuMatrix(name="embedding", forms=forms),), fixed=Costs(), source=Costs(160), context=8
    )


def make_look(arch: Any, factor: float, larger: Callable[[str], float] = lambda scheme: 0.0) -> Look:
    """Measures the factor times the loss of the menu, and more bytes than those of the menu."""

    def look(choice: FitChoice, name: str) -> Looked:
        scheme = choice.outer["embedding"].scheme
        loss, size = SIZES[scheme]
        costs = Costs(size + larger(scheme or "float"))
        losses = {"text": TextLoss(factor * loss, None, 4.0, 100, factor * loss)}
        return Looked(name, {}, Path(), identity_blueprint(arch), costs, losses)

    return look


def schemes(found: Any) -> list[str | None]:
    return [each.choice.outer["embedding"].scheme for each in found]


def test_a_look_corrects_the_next_prediction_and_not_its_own(arch: Any) -> None:
    search = Search(make_menu(), arch, make_look(arch, 3.0))
    (first,) = search.find(Limits(bytes=90.0), 1, "fit")
    assert (first.choice.loss, first.looked.loss) == pytest.approx((0.01, 0.03))
    (second,) = search.find(Limits(bytes=50.0), 1, "fit")
    assert second.choice.loss == pytest.approx(3 * 0.04, rel=0.2)
    assert [each.predicted for each in search.seen] == [{"bits": pytest.approx(0.01)}, {"bits": pytest.approx(0.04)}]


def test_a_candidate_that_is_converted_beyond_a_limit_is_no_result(arch: Any) -> None:
    look = make_look(arch, 1.0, lambda scheme: 20.0 if scheme == "int8" else 0.0)
    message = r"fit: a converted candidate within the limits is required \(got none in 1 looks\); raise --looks"
    with pytest.raises(RefoldError, match=message):
        Search(make_menu(), arch, look).find(Limits(bytes=90.0), 1, "fit")
    assert schemes(Search(make_menu(), arch, look).find(Limits(bytes=110.0), 1, "fit")) == ["int8"]
    search = Search(make_menu(), arch, look)
    search.menu = search.menu.model_copy(update={"scales": {"bits": 3.0}})
    with pytest.raises(RefoldError, match=message):
        search.find_cheapest(Limits(bytes=90.0), "bytes", 0.05, 1, "fit")


@pytest.mark.parametrize(("factor", "first"), [(0.1, "int2"), (1.0, "int4"), (3.0, "int8"), (10.0, None)])
def test_the_cheapest_within_a_measured_loss_is_found_from_wrong_predictions(
    arch: Any, factor: float, first: str | None
) -> None:
    search = Search(make_menu(), arch, make_look(arch, factor))
    assert schemes(search.find_cheapest(Limits(), "bytes", 0.05, 8, "fit"))[0] == first


def test_earlier_candidates_count_where_corrected_predictions_leave_none(arch: Any) -> None:
    losses, plain = {"int8": 0.04, "int4": 2.0}, make_look(arch, 1.0)

    def look(choice: FitChoice, name: str) -> Looked:
        loss = losses[str(choice.outer["embedding"].scheme)]
        return plain(choice, name)._replace(losses={"text": TextLoss(loss, None, 4.0, 100, loss)})

    search = Search(make_menu(), arch, look)
    search.menu = search.menu.model_copy(update={"scales": {"bits": 3.0}})
    # First int8; its factor of 4 leaves it, the loss that is asked for rises, and int4 raises the factor beyond all.
    found = search.find_cheapest(Limits(bytes=90.0), "bytes", 0.05, 8, "fit")
    assert "int8" in schemes(found)
    assert "int4" not in schemes(found)


def test_a_loss_that_no_candidate_has_names_the_nearest(arch: Any) -> None:
    search = Search(make_menu(), arch, make_look(arch, 50.0))
    with pytest.raises(
        RefoldError, match=r"a measured loss of at most 0.05 nats is required \(got 2.0000 at best in 1 looks"
    ):
        search.find_cheapest(Limits(bytes=90.0), "bytes", 0.05, 4, "fit")


def test_a_candidate_that_the_engine_does_not_hold_is_no_result(arch: Any) -> None:
    search = Search(make_menu(), arch, make_look(arch, 1.0), lambda looked: False, engine="llama.cpp")
    with pytest.raises(RefoldError, match=r"a converted candidate that llama\.cpp holds is required \(got none in 1"):
        search.find(Limits(bytes=90.0), 1, "fit")


def test_a_limit_of_the_quantity_that_is_made_smallest_holds_too() -> None:
    with pytest.raises(RefoldError, match=r"at most 0.001 nats is so small \(got bytes 90 B\); the least .* is 160 B"):
        cheapest(make_menu(), "bytes", 0.001, Limits(bytes=90.0))
    assert cheapest(make_menu(), "bytes", 0.02, Limits(bytes=90.0)).choice.costs.bytes == 80
