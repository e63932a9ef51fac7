"""Budgets as a user writes them."""

import pytest

from refold.errors import RefoldError
from refold.fitting.budget import Budget, Limits, format_quantity, parse_budget
from refold.fitting.floor import check_budget, find_floor
from refold.fitting.menu import Costs, MatrixForm, Menu, MenuMatrix, PartForm, PartMenu

SOURCE = Costs(bytes=2e9, cache=1e8, flops=3e9, milliseconds=40.0)


def test_shares_and_amounts_are_read() -> None:
    budget = parse_budget(bytes="35%", cache="12.5MB", flops="2.1 GFLOPs", latency="0.02s", context=4096)
    assert budget.limits(SOURCE) == Limits(bytes=7e8, cache=12.5e6, flops=2.1e9, milliseconds=20.0)
    assert parse_budget(bytes="1.5 GiB").limits(SOURCE).bytes == 1.5 * 2**30
    assert parse_budget(bytes="800mb").limits(SOURCE).bytes == 8e8
    assert parse_budget(latency="50%").limits(SOURCE).milliseconds == 20.0
    assert parse_budget(max_loss=0.05).limits(SOURCE) == Limits(loss=0.05)
    assert Budget.model_validate_json(budget.model_dump_json()) == budget
    assert budget.describe() == (
        "bytes 35%, cache 12.5MB at 4,096 tokens, flops 2.1 GFLOPs at 4,096 tokens, latency 0.02s at 4,096 tokens"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"budget: a limit is required \(got none\); give --bytes 35%"),
        ({"bytes": "20ms"}, r"--bytes: must be in %, B, .* \(got '20ms'\); did you mean --latency 20ms\?"),
        ({"latency": "2GB"}, r"--latency: must be in %, us, ms, s \(got '2GB'\); did you mean --bytes 2GB\?"),
        ({"flops": "12parsecs"}, r"--flops: must be in %, FLOPs, .* \(got '12parsecs'\); write 70% or 12GFLOPs"),
        ({"cache": "25"}, r"--cache: % or a unit is required \(got '25'\); write 25% for a share"),
        ({"bytes": "5000000"}, r"--bytes: % or a unit is required \(got '5000000'\); write 35% or 1\.5GB"),
        ({"bytes": "-5%"}, r"--bytes: a share or an amount is required \(got '-5%'\)"),
        ({"bytes": "nan%"}, r"--bytes: a share or an amount is required"),
        ({"bytes": ""}, r"--bytes: a share or an amount is required \(got ''\)"),
        ({"bytes": "0%"}, r"--bytes: more than 0 is required \(got '0%'\)"),
        ({"max_loss": -1.0}, r"--max-loss: a number of nats per token above 0 is required \(got -1\.0\)"),
        ({"max_loss": float("nan")}, r"--max-loss: a number of nats per token above 0 is required \(got nan\)"),
        ({"bytes": "5%", "context": 0}, r"--context: a number of tokens from 1 is required \(got 0\)"),
    ],
)
def test_what_is_no_budget_is_refused(given: dict, message: str) -> None:
    with pytest.raises(RefoldError, match=message):
        parse_budget(**given)


def test_a_budget_of_all_the_source_leaves_nothing_to_do() -> None:
    with pytest.raises(RefoldError, match=r"a limit below the source is required \(--bytes 100%.*\); there is nothing"):
        parse_budget(bytes="100%").limits(SOURCE)
    with pytest.raises(RefoldError, match=r"--bytes 3GB: the source has 2 GB .*, --cache 150%: .*nothing to do"):
        parse_budget(bytes="3GB", cache="150%").limits(SOURCE)
    assert parse_budget(bytes="100%", cache="50%").limits(SOURCE).bytes == SOURCE.bytes


def test_a_latency_requires_a_table() -> None:
    for latency in ("30%", "20ms"):
        with pytest.raises(RefoldError, match=rf"--latency: a table of a device is required \(got {latency} without"):
            parse_budget(latency=latency).limits(SOURCE._replace(milliseconds=0.0))


def small_menu() -> Menu:
    def matrix(name: str, size: float) -> MenuMatrix:
        sizes = ((None, size), ("int8", size / 2), ("int4", size / 4))
        forms = (MatrixForm(rank=None, scheme=scheme, loss=0.1, costs=Costs(amount)) for scheme, amount in sizes)
        return MenuMatrix(name=name, forms=tuple(forms))

    whole = PartForm(kind="whole", loss=0.0, costs=Costs(10), matrices=(matrix("down_proj", 4000),))
    drop = PartForm(kind="drop", loss=1.0, costs=Costs())
    part = PartMenu(layer=0, pool="mlp", forms=(whole, drop))
    source = Costs(4000 + 10 + 8000 + 100)
    return Menu(parts=(part,), outer=(matrix("embedding", 8000),), fixed=Costs(100), source=source, context=8)


def test_the_floor_is_named_with_its_parts() -> None:
    menu = small_menu()
    floor = find_floor(menu)
    assert floor.least == 2100
    assert floor.parts == {"embedding": 2000.0, "parts that no choice changes": 100.0}
    assert find_floor(menu, without=("drop",)).least == 2100 + 10 + 1000
    message = r"--bytes: at least 2\.1 kB \(17\.3% of the source\): embedding 2 kB, .* \(got 10%, which is 1\.21 kB\)"
    with pytest.raises(RefoldError, match=message):
        check_budget(parse_budget(bytes="10%"), menu)
    check_budget(parse_budget(bytes="18%"), menu)


def test_amounts_are_written_with_units() -> None:
    amounts = [("bytes", 1.5e9), ("flops", 1.2e10), ("milliseconds", 20.0), ("loss", 0.05), ("cache", 12.0)]
    told = [format_quantity(name, amount) for name, amount in amounts]
    assert told == ["1.5 GB", "12 GFLOPs", "20 ms", "0.05 nats", "12 B"]
