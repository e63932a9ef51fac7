"""A choice in words and figures agrees with a count by hand."""

import pytest

from refold.fitting.menu import (
    ChosenPart,
    Costs,
    FitChoice,
    MatrixForm,
    Menu,
    MenuMatrix,
    PartForm,
    PartMenu,
    TieForm,
)
from refold.fitting.summary import share_classes, summarise

FLOATS = MatrixForm(rank=None, scheme=None, loss=0.0, costs=Costs(100, 0, 200))
INT4 = MatrixForm(rank=None, scheme="int4", loss=0.01, costs=Costs(30, 0, 200))
RANK = MatrixForm(rank=16, scheme=None, loss=0.02, costs=Costs(40, 0, 80))
BOTH = MatrixForm(rank=32, scheme="int4", loss=0.03, costs=Costs(20, 0, 160))
NARROW = MatrixForm(rank=None, scheme=None, loss=0.0, costs=Costs(50, 0, 100))


def matrix(*forms: MatrixForm) -> MenuMatrix:
    return MenuMatrix(name="up_proj", forms=forms)


WHOLE = PartForm(kind="whole", loss=0.0, costs=Costs(4, 10, 6), matrices=(matrix(FLOATS, INT4, RANK, BOTH),))
WIDTH = PartForm(kind="width", loss=0.05, costs=Costs(4, 10, 6), matrices=(matrix(NARROW),))
DROPPED = PartForm(kind="drop", loss=0.2, costs=Costs(0, 0, 0))


@pytest.fixture
def menu() -> Menu:
    parts = [PartMenu(layer=layer, pool="mlp", forms=(WHOLE, WIDTH, DROPPED)) for layer in range(6)]
    embedding = MenuMatrix(name="embedding", forms=(FLOATS, INT4))
    fixed, part = Costs(7, 0, 1), WHOLE.costs.plus(FLOATS.costs)
    source = fixed.plus(FLOATS.costs)
    for _ in parts:
        source = source.plus(part)
    return Menu(parts=tuple(parts), outer=(embedding,), fixed=fixed, source=source, context=64)


@pytest.fixture
def choice(menu: Menu) -> FitChoice:
    forms = [(WHOLE, INT4), (WHOLE, BOTH), (WIDTH, NARROW), (DROPPED, None)]
    parts = tuple(
        ChosenPart(layer, "mlp", form, {} if chosen is None else {"up_proj": chosen})
        for layer, (form, chosen) in enumerate(forms)
    )
    tie = TieForm(pool="mlp", layers=(4, 5), loss=0.07, costs=Costs(4, 20, 12), matrices=(matrix(FLOATS, RANK),))
    costs = menu.fixed.plus(INT4.costs).plus(tie.costs).plus(RANK.costs)
    for part in parts:
        costs = costs.plus(part.form.costs)
        for form in part.matrices.values():
            costs = costs.plus(form.costs)
    losses = {"bits": 0.02, "rank": 0.02, "rank and bits": 0.03, "width": 0.05, "drop": 0.2, "tie": 0.07, "pairs": 0.0}
    return FitChoice(parts, ((tie, {"up_proj": RANK}),), {"embedding": INT4}, sum(losses.values()), losses, costs)


def test_the_savings_of_the_classes_add_up_to_the_whole_saving(menu: Menu, choice: FitChoice) -> None:
    classes = share_classes(choice, menu)
    for quantity in ("bytes", "cache", "flops", "milliseconds"):
        saved = sum(getattr(each.saved, quantity) for each in classes)
        assert saved == pytest.approx(getattr(menu.source, quantity) - getattr(choice.costs, quantity)), quantity
    assert sum(each.loss for each in classes) == pytest.approx(choice.loss)
    assert [each.saved.bytes for each in classes] == sorted((each.saved.bytes for each in classes), reverse=True)


def test_each_class_has_its_number_loss_and_saving(menu: Menu, choice: FitChoice) -> None:
    found = {each.name: (each.number, each.loss, each.saved.bytes) for each in share_classes(choice, menu)}
    assert found == {
        "bits": (2, 0.02, 140),
        "rank and bits": (1, 0.03, 80),
        "rank": (1, 0.02, 60),
        "width": (1, 0.05, 50),
        "drop": (1, 0.2, 104),
        "tie": (1, 0.07, 104),
    }


def test_the_sentence_names_schemes_ranks_parts_and_ties(choice: FitChoice) -> None:
    assert summarise(choice) == (
        "of 5 matrices: int4 in 3, floats in 2; ranks 16 to 32 in 2; "
        "drop in 1 MLP; width in 1 MLP; 2 MLPs tied in pairs"
    )
