"""Choices from menus, against a search of all choices."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.blueprint.schema import Pool
from refold.errors import RefoldError
from refold.fitting.budget import Limits
from refold.fitting.choose import BoundedChoice, cheapest, choose, choose_several, least_possible, predicted
from refold.fitting.menu import (
    QUANTITIES,
    Costs,
    FitChoice,
    MatrixForm,
    Menu,
    MenuMatrix,
    PartForm,
    PartMenu,
    PartPair,
    TieForm,
    matrix_class,
)

POOLS: tuple[Pool, Pool] = ("mixer", "mlp")


def matrix(draw: random.Random, name: str, num_forms: int, size: float = 1.0) -> MenuMatrix:
    """The whole matrix in floats, and smaller forms that lose more."""
    forms = [MatrixForm(rank=None, scheme=None, loss=0.0, costs=Costs(100 * size, 0, 50 * size, size))]
    for index in range(1, num_forms):
        share = draw.uniform(0.05, 0.95)
        rank, scheme = (None, "int4") if index % 2 else (8 * index, None)
        flops = 50 * size if rank is None else 50 * size * draw.uniform(0.1, 1)
        costs = Costs(round(100 * size * share), 0, round(flops), size * draw.uniform(0.2, 1))
        forms.append(MatrixForm(rank=rank, scheme=scheme, loss=(1 - share) ** 2 * draw.uniform(0.5, 2), costs=costs))
    return MenuMatrix(name=name, forms=tuple(forms))


def make_menu(seed: int, num_layers: int = 2, num_forms: int = 3, ties: bool = True) -> Menu:
    draw = random.Random(seed)
    parts = []
    for layer in range(num_layers):
        for pool in POOLS:
            cache = 40.0 if pool == "mixer" else 0.0
            whole = (matrix(draw, "a", num_forms), matrix(draw, "b", num_forms))
            other = draw.choice(("width", "mixer", "share_kv")) if pool == "mixer" else "width"
            needs = "keys" if other == "share_kv" and layer else None
            left = draw.choice(("drop", "replace"))
            forms = [PartForm(kind="whole", loss=0.0, costs=Costs(2, cache, 10, 0.1), matrices=whole)]
            narrow = (matrix(draw, "a", num_forms, 0.5), whole[1])
            costs = Costs(2, cache / 2, 5, 0.1)
            forms.append(PartForm(kind=other, loss=draw.uniform(0, 1), costs=costs, matrices=narrow, needs=needs))
            if layer or pool == "mlp":
                needed = "projection" if left == "replace" else None
                forms.append(PartForm(kind=left, loss=draw.uniform(0.5, 2), costs=Costs(), needs=needed))
            parts.append(PartMenu(layer=layer, pool=pool, forms=tuple(forms)))
    pairs = []
    for index, first in enumerate(parts):
        for second in parts[index + 1 : index + 4]:
            if second.layer - first.layer <= 1 and draw.random() < 0.7:
                places = (first.layer, first.pool), (second.layer, second.pool)
                pairs.append(PartPair(first=places[0], second=places[1], loss=draw.uniform(-0.2, 1.5)))
    tied = []
    for layer in range(num_layers - 1 if ties else 0):
        shared = (matrix(draw, "a", num_forms), matrix(draw, "b", num_forms))
        pool = draw.choice(POOLS)
        costs = Costs(2, 80 if pool == "mixer" else 0, 120, 2.2)
        tied.append(
            TieForm(pool=pool, layers=(layer, layer + 1), loss=draw.uniform(0, 1), costs=costs, matrices=shared)
        )
    return Menu(
        parts=tuple(parts),
        outer=(matrix(draw, "embedding", num_forms, 2.0),),
        ties=tuple(tied),
        pairs=tuple(pairs),
        fixed=Costs(7, 3, 11, 0.5),
        source=Costs(404 * num_layers + 207, 40 * num_layers + 3, 220 * num_layers + 111, 4.2 * num_layers + 2.5),
        context=64,
        scales={"bits": 1.5, "drop": 0.7, "pairs": 1.2, "tie": 2.0},
    )


def scaled(menu: Menu, name: str, loss: float) -> float:
    return menu.scales.get(name, 1.0) * loss


def forms_of(menu: Menu, matrices: Sequence[MenuMatrix]) -> np.ndarray:
    """Loss and costs of every choice of forms."""
    sums = np.zeros((1, 5))
    for each in matrices:
        rows = [(scaled(menu, matrix_class(form), form.loss), *form.costs) for form in each.forms]
        sums = (sums[:, None] + np.array(rows)[None]).reshape(-1, 5)
    return sums


def structures(menu: Menu) -> Iterator[tuple[float, Costs, list[MenuMatrix]]]:
    """Every choice of part forms and ties, written without regard to the search: place by place."""
    for tied in product(range(2), repeat=len(menu.ties)):
        ties = [tie for tie, taken in zip(menu.ties, tied, strict=True) if taken]
        taken = [(layer, tie.pool) for tie in ties for layer in tie.layers]
        if len(set(taken)) < len(taken):
            continue
        free = [part for part in menu.parts if (part.layer, part.pool) not in taken]
        for forms in product(*(part.forms for part in free)):
            made = {(part.layer, part.pool): form for part, form in zip(free, forms, strict=True)}
            if not all(is_valid(menu, made, place) for place in made):
                continue
            left = {place for place, form in made.items() if form.kind in ("drop", "replace")}
            loss = sum(scaled(menu, form.kind, form.loss) for form in forms)
            loss += sum(scaled(menu, "tie", tie.loss) for tie in ties)
            loss += sum(scaled(menu, "pairs", pair.loss) for pair in menu.pairs if {pair.first, pair.second} <= left)
            costs = menu.fixed
            for each in (*forms, *ties):
                costs = costs.plus(each.costs)
            matrices = [*menu.outer, *(each for form in (*forms, *ties) for each in form.matrices)]
            yield loss, costs, matrices


def is_valid(menu: Menu, made: Mapping[Any, PartForm], place: tuple[int, str]) -> bool:
    form, places = made[place], [(part.layer, part.pool) for part in menu.parts]
    if form.needs == "projection":
        before = places[places.index(place) - 1]
        return before in made and made[before].kind not in ("drop", "replace")
    if form.needs == "keys":
        before = (place[0] - 1, place[1])
        return before in made and made[before].kind == "whole"
    return True


def all_choices(menu: Menu) -> np.ndarray:
    """Loss and costs of every choice."""
    found = [forms_of(menu, made) + np.array((loss, *costs)) for loss, costs, made in structures(menu)]
    return np.concatenate(found)


def possible_losses(menu: Menu, limits: Limits) -> list[float]:
    made = all_choices(menu)
    bounds = np.array([np.inf if bound is None else bound + 1e-9 for bound in limits[:4]])
    return sorted(made[(made[:, 1:] <= bounds).all(axis=1), 0].tolist())


def within(costs: Costs, limits: Limits) -> bool:
    return all(bound is None or value <= bound for value, bound in zip(costs, limits[:4], strict=True))


def limits_for(menu: Menu, share: float, quantities: Sequence[str]) -> Limits:
    """Limits at a share of the way from the least of each quantity to the source's."""
    bounds = {}
    for name in quantities:
        least = getattr(least_possible(menu, name).costs, name)
        bounds[name] = least + share * (getattr(menu.source, name) - least)
    return Limits(**bounds)


def recomputed(menu: Menu, choice: FitChoice) -> Costs:
    costs = menu.fixed
    for part in choice.parts:
        costs = costs.plus(part.form.costs)
    for tie, _ in choice.ties:
        costs = costs.plus(tie.costs)
    taken = (*(part.matrices for part in choice.parts), *(forms for _, forms in choice.ties), choice.outer)
    for forms in taken:
        for form in forms.values():
            costs = costs.plus(form.costs)
    return costs


quantities = st.lists(st.sampled_from(QUANTITIES), min_size=1, max_size=3, unique=True)


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.9), names=quantities)
def test_a_choice_is_as_good_as_the_best_of_all_choices(seed: int, share: float, names: list[str]) -> None:
    menu = make_menu(seed, num_layers=2, num_forms=2)
    limits = limits_for(menu, share, names)
    possible = possible_losses(menu, limits)
    if not possible:
        with pytest.raises(RefoldError, match="budget: no choice"):
            choose(menu, limits)
        return
    made = choose(menu, limits)
    assert within(made.choice.costs, limits)
    assert made.choice.loss == pytest.approx(min(possible), abs=1e-9)
    assert made.bound <= min(possible) + 1e-9
    assert tuple(made.choice.costs) == pytest.approx(tuple(recomputed(menu, made.choice)))
    assert predicted(menu, made.choice).loss == pytest.approx(made.choice.loss)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 0.9), names=quantities)
def test_parts_and_ties_are_chosen_within_the_bound(seed: int, share: float, names: list[str]) -> None:
    # One form of each matrix, so that all structures of four layers can be listed; more than are searched whole.
    menu = make_menu(seed, num_layers=3, num_forms=1)
    limits = limits_for(menu, share, names)
    possible = possible_losses(menu, limits)
    if not possible:
        return
    made = choose(menu, limits)
    assert within(made.choice.costs, limits)
    assert made.bound - 1e-9 <= min(possible) <= made.choice.loss + 1e-9
    # What the bound leaves open is at most one change of a part.
    assert made.choice.loss <= min(possible) + 2.0


def test_one_part_is_chosen_exactly() -> None:
    draw = random.Random(3)
    part = PartMenu(
        layer=0,
        pool="mlp",
        forms=(
            PartForm(kind="whole", loss=0.0, costs=Costs(3), matrices=(matrix(draw, "a", 9), matrix(draw, "b", 9))),
            PartForm(
                kind="width", loss=0.1, costs=Costs(3), matrices=(matrix(draw, "a", 9, 0.5), matrix(draw, "b", 9))
            ),
        ),
    )
    menu = Menu(parts=(part,), outer=(), fixed=Costs(), source=Costs(203, 0, 100, 2), context=8)
    for share in (0.2, 0.35, 0.5, 0.65, 0.8):
        limits = Limits(bytes=203 * share, flops=90.0)
        best = possible_losses(menu, limits)[0]
        assert choose(menu, limits).choice.loss == pytest.approx(best, abs=1e-12)


def test_a_larger_budget_is_never_worse() -> None:
    menu = make_menu(2)
    losses = [choose(menu, limits_for(menu, share / 10, ("bytes", "flops"))).choice.loss for share in range(1, 11)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] + 0.5


def test_pairs_and_ties_matter() -> None:
    menu = make_menu(1, num_layers=3, num_forms=2)
    limits = limits_for(menu, 0.1, ("bytes",))
    right = choose(menu, limits)
    blind = choose(menu.model_copy(update={"pairs": ()}), limits)
    assert predicted(menu, blind.choice).loss > right.choice.loss
    untied = choose(menu, limits, without=("tie",))
    assert right.choice.ties
    assert not untied.choice.ties
    assert untied.choice.loss > right.choice.loss


def big_menu(num_layers: int) -> Menu:
    return make_menu(8, num_layers=num_layers, num_forms=8)


def test_a_deep_menu_is_chosen_close_to_its_bound() -> None:
    menu = big_menu(24)
    most_bytes = 0.35 * 24 * 404
    limits = Limits(bytes=most_bytes, cache=0.5 * 24 * 40, flops=0.6 * 24 * 220)
    made = choose(menu, limits)
    assert within(made.choice.costs, limits)
    assert made.bound <= made.choice.loss <= 1.01 * made.bound
    # A price is what one more byte is worth: a little more of it gains about as much.
    more = choose(menu, limits._replace(bytes=1.02 * most_bytes))
    gained = made.choice.loss - more.choice.loss
    assert gained == pytest.approx(made.prices.bytes * 0.02 * most_bytes, rel=0.5)


def test_classes_that_are_forbidden_are_not_chosen() -> None:
    menu = make_menu(7, num_layers=3, num_forms=5)
    limits = limits_for(menu, 0.5, ("bytes",))
    assert {"bits", "rank"} & choose(menu, limits).choice.losses.keys()
    made = choose(menu, limits, without=("bits", "width", "drop", "replace", "tie"))
    assert not {"bits", "width", "drop", "replace", "tie"} & made.choice.losses.keys()


def different(made: Sequence[BoundedChoice]) -> bool:
    return len({repr(each.choice) for each in made}) == len(made)


def test_several_choices_differ_and_are_within_the_limits() -> None:
    menu = make_menu(21, num_layers=4, num_forms=4)
    limits = limits_for(menu, 0.3, ("bytes", "cache"))
    made = choose_several(menu, limits, 5)
    assert len(made) == 5
    assert different(made)
    assert all(within(each.choice.costs, limits) for each in made)
    losses = [each.choice.loss for each in made]
    assert losses[0] == choose(menu, limits).choice.loss
    assert losses[1:] == sorted(losses[1:])
    assert losses == pytest.approx([predicted(menu, each.choice).loss for each in made])


def test_the_cheapest_choice_within_a_loss_is_found() -> None:
    menu = make_menu(4, num_layers=2, num_forms=2)
    made = all_choices(menu)
    least = made[made[:, 0] <= 0.8, 1].min()
    made = cheapest(menu, "bytes", 0.8)
    assert made.choice.costs.bytes == least
    assert made.choice.loss <= 0.8
    assert made.bound <= least
    assert cheapest(menu, "bytes", 0.8, Limits(cache=made.choice.costs.cache)).choice.costs.bytes == least


def test_a_budget_that_cannot_be_met_names_the_nearest() -> None:
    menu = make_menu(2, num_forms=2)
    least = least_possible(menu, "bytes").costs.bytes
    with pytest.raises(RefoldError, match=rf"no choice is so small \(got bytes 5 B\); .* bytes {least:.0f} B"):
        choose(menu, Limits(bytes=5.0))
    tight = limits_for(menu, 0.01, QUANTITIES)
    assert not possible_losses(menu, tight)
    with pytest.raises(RefoldError, match="no choice meets all limits together"):
        choose(menu, tight)
    with pytest.raises(RefoldError, match=r"a predicted loss of at most 0\.001 nats"):
        choose(menu, limits_for(menu, 0.1, ("bytes",))._replace(loss=0.001))


def test_ties_and_pairs_of_distant_layers_are_refused() -> None:
    menu = make_menu(3, num_layers=3)
    far = menu.ties[0].model_copy(update={"layers": (0, 2)})
    with pytest.raises(RefoldError, match=r"a tie must join .* two neighbouring layers \(got 0 and 2\)"):
        choose(menu.model_copy(update={"ties": (far,)}), Limits(bytes=500.0))
    pair = PartPair(first=(0, "mlp"), second=(2, "mlp"), loss=1.0)
    with pytest.raises(RefoldError, match="a pair must have two parts of one layer or of two neighbouring"):
        choose(menu.model_copy(update={"pairs": (pair,)}), Limits(bytes=500.0))


def test_a_form_that_needs_a_part_before_the_first_is_refused() -> None:
    menu = make_menu(3)
    first = menu.parts[0]
    form = PartForm(kind="replace", loss=0.1, costs=Costs(), needs="projection")
    changed = first.model_copy(update={"forms": (*first.forms, form)})
    with pytest.raises(RefoldError, match="form replace of the mixer of layer 0 needs projection of a part"):
        choose(menu.model_copy(update={"parts": (changed, *menu.parts[1:])}), Limits(bytes=500.0))


@pytest.mark.parametrize("mixer", ["attention", "linear_attention"])
def test_a_part_is_replaced_only_behind_one_of_the_source_type(mixer: str) -> None:
    menu = make_menu(3, num_layers=1, ties=False)
    whole = menu.parts[0].forms[0]
    cheap = PartForm(kind="mixer", setting={"type": mixer}, loss=0.0, costs=Costs(), matrices=whole.matrices[:1])
    gone = PartForm(kind="replace", loss=0.0, costs=Costs(), needs="projection")
    parts = [
        menu.parts[0].model_copy(update={"forms": (whole, cheap)}),
        menu.parts[1].model_copy(update={"forms": (menu.parts[1].forms[0], gone)}),
    ]
    found = least_possible(menu.model_copy(update={"parts": tuple(parts), "pairs": ()}), "bytes")
    kinds = [part.form.kind for part in found.parts]
    assert (kinds == ["mixer", "replace"]) is (mixer == "attention")
