"""Pages in attention workers give the hidden states that pages of this process give."""

import random
from typing import Any

import pytest

from refold.engine.pages import PoolSettings
from refold.engine.pools import Pools
from refold.engine.remote_keeper import RemoteKeeper
from refold.engine.settings import AttentionWorkers
from tests.engine.test_paged_store import STACKS, load, run_schedule

__all__ = ["load"]


def make_pools(model: Any, addresses: tuple[str, ...], split: Any) -> Pools:
    blueprint = model.config.read_blueprint()
    sizes = PoolSettings(num_pages=90, max_rows=6, page_size=4)
    num_shares = len(addresses) if split == "rows" else 1

    def make_keeper(groups: Any) -> RemoteKeeper:
        return RemoteKeeper(blueprint, sizes, groups, addresses, AttentionWorkers(0, addresses, split))

    return Pools(blueprint, sizes, make_keeper, num_shares)


# Every stack is split both ways; further numbers of workers deal out the same pages differently.
@pytest.mark.parametrize(
    ("split", "count"),
    [
        ("heads", 2),
        ("rows", 3),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in (("heads", 1), ("heads", 3), ("rows", 1), ("rows", 2))
        ),
    ],
)
# Engines refuse attention workers for stacks without attention.
@pytest.mark.parametrize("name", [name for name in STACKS if name != "no attention"])
def test_any_schedule_gives_the_hidden_states_of_a_plain_pass(load, workers, name, split, count):
    model = load(*STACKS[name])
    if split == "heads":
        count = min(count, model.config.read_blueprint().arch.num_key_value_heads)
    pools = make_pools(model, workers.addresses[:count], split)
    try:
        runner = run_schedule(model, pools, random.Random(f"{name}{split}").randint, True, 12)
        assert runner.compare() < 1e-5
        for row in range(4):
            pools.release(row)
        pools.check()
        assert pools.used_pages == 0
    finally:
        pools.close()


def test_heads_of_the_wrong_worker_are_seen(load, workers):
    pools = make_pools(load(*STACKS["strict"]), workers.addresses[:2], "heads")
    assert isinstance(pools.keeper, RemoteKeeper)
    first, second = pools.keeper.shares
    first.heads, second.heads = second.heads, first.heads
    try:
        assert run_schedule(load(*STACKS["strict"]), pools, random.Random(0).randint, True, 12).compare() > 1e-2
    finally:
        pools.close()


def test_a_message_that_makes_no_sense_ends_the_session_and_not_the_worker(load, workers):
    model = load(*STACKS["strict"])
    pools = make_pools(model, workers.addresses[:1], "heads")
    assert isinstance(pools.keeper, RemoteKeeper)
    pools.keeper.shares[0].send((99,))
    run_schedule(model, pools, random.Random(0).randint, True, 3)
    assert "attention worker 1 of 1" in pools.lost_shares()[0]
    pools.close()
    pools = make_pools(model, workers.addresses[:1], "heads")
    try:
        assert run_schedule(model, pools, random.Random(0).randint, True, 12).compare() < 1e-5
    finally:
        pools.close()
