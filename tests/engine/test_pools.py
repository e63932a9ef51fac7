"""Pools without a model: pages are never lost, never shared wrongly, and never given to two rows."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from refold.blueprint.schema import Blueprint
from refold.engine.page_keeper import LocalKeeper
from refold.engine.page_plan import Spans
from refold.engine.pages import ABSENT, PageGroup, PoolSettings, fit_pages, page_bytes, pool_bytes
from refold.engine.pools import Pools
from refold.families.registry import read_arch
from refold.mixers.registry import MIXERS

ROWS = 4
PAGE = 4
ARCH = read_arch(
    {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
    }
)


def make_blueprint(windows: tuple[int | None, ...], recurrent: tuple[int, ...] = ()) -> Blueprint:
    """A stack with a mixer for each depth."""
    state = MIXERS["retention"](type="retention").resolve(ARCH, "mixers[0]")
    mixers = [{"mixer": state} if index in recurrent else {} for index in range(len(windows))]
    depths = [{"source": 0, "mixer": index, "mlp": 0, "window": window} for index, window in enumerate(windows)]
    return Blueprint.model_validate({"arch": ARCH, "mixers": mixers, "mlps": [{}], "depths": depths})


def make_pools(windows: tuple[int | None, ...] = (None, 6, 6), recurrent: tuple[int, ...] = (), **fields: Any) -> Pools:
    fields = {"num_pages": 12, "max_rows": ROWS, "page_size": PAGE, "num_saved_states": 3, **fields}
    return Pools(make_blueprint(windows, recurrent), PoolSettings(**fields))


def states_of(pools: Pools, depth: int, *rows: int) -> torch.Tensor:
    """States of rows at a recurrent depth, which must have some."""
    found = pools.states.read((depth, True), torch.tensor(rows))
    assert found is not None
    return found


def planes_of(pools: Pools, group: PageGroup) -> list[torch.Tensor]:
    """Keys, then values, of all depths of a group."""
    assert isinstance(pools.keeper, LocalKeeper)
    return pools.keeper.planes(pools.groups.index(group))


def test_pages_and_pools_have_the_bytes_that_the_tensors_have():
    blueprint = make_blueprint((None, 6, 6))
    given = PoolSettings(num_pages=12, max_rows=2, page_size=PAGE, max_span=5)
    pools = Pools(blueprint, given)
    found = {group.window: sum(plane.nbytes for plane in planes_of(pools, group)) for group in pools.groups}
    each = page_bytes(blueprint, given)
    assert found == {None: 12 * each[None], 6: given.pages_of(6) * each[6]}
    assert sum(found.values()) == pool_bytes(blueprint, given)
    assert given.pages_of(6) == 2 * (3 + 1)
    fitted = fit_pages(blueprint, given, pool_bytes(blueprint, given) - 1)
    assert fitted.num_pages == 11
    assert fit_pages(blueprint, given, 10**9) == given


def test_too_few_pages_change_nothing():
    pools = make_pools()
    assert pools.reserve(0, 40)
    assert pools.free_pages == 2
    before = [group.tables.copy() for group in pools.groups]
    assert not pools.reserve(1, 12)
    assert not pools.reserve(0, 52)
    assert all((group.tables == old).all() for group, old in zip(pools.groups, before, strict=True))
    assert pools.reserve(1, 8)
    assert pools.free_pages == 0
    assert pools.used_pages == 12
    pools.release(0)
    pools.check()
    assert pools.free_pages == 10


def test_a_row_lies_in_one_piece_where_it_can():
    pools = make_pools((None,))
    pools.reserve(0, 8)
    pools.reserve(1, 8)
    pools.reserve(0, 12)
    table = pools.groups[0].tables
    assert table[0, :3].tolist() == [0, 1, 4]
    assert table[1, :2].tolist() == [2, 3]
    pools.release(1)
    assert pools.reserve(2, 12)
    assert table[2, :3].tolist() == [2, 3, 5]


def test_a_window_gives_pages_back_and_the_whole_context_keeps_them():
    pools = make_pools()
    whole, windowed = pools.groups
    pools.reserve(0, 24)
    pools.pass_window(0, 13)
    # Position 13 sees 8 to 13, so that blocks 0 and 1 are passed.
    assert windowed.tables[0, :6].tolist()[:2] == [ABSENT, ABSENT]
    assert (windowed.tables[0, 2:6] >= 0).all()
    assert (whole.tables[0, :6] >= 0).all()
    assert windowed.num_free == 12 - 4
    pools.check()
    pools.pass_window(0, 12)
    assert windowed.num_free == 12 - 4
    pools.release(0)
    pools.check()


def test_prefixes_are_found_by_their_tokens_alone():
    pools = make_pools((None,))
    prompt = list(range(11))
    pools.reserve(0, 11)
    pools.publish(0, prompt, 11)
    assert pools.attach_prefix(1, prompt) == 8
    assert pools.groups[0].tables[1, :2].tolist() == pools.groups[0].tables[0, :2].tolist()
    # At least one token is left to run.
    assert pools.attach_prefix(2, prompt[:8]) == 4
    assert pools.attach_prefix(3, [9, *prompt[1:]]) == 0
    pools.release(3)
    assert pools.attach_prefix(3, [*prompt[:4], 9, 9, 9, 9, 9]) == 4
    pools.check()
    for row in range(ROWS):
        pools.release(row)
    assert pools.used_pages == 0
    assert pools.cached_blocks == 2
    # The second block is found behind the first alone.
    assert pools.attach_prefix(0, prompt[4:]) == 0


def test_cached_prefixes_give_way_the_oldest_and_longest_first():
    pools = make_pools((None,), num_pages=6)
    for start in (0, 20):
        pools.reserve(0, 8)
        pools.publish(0, list(range(start, start + 8)), 8)
        pools.release(0)
    assert pools.cached_blocks == 4
    assert pools.free_pages == 6
    assert pools.reserve(1, 12)
    assert pools.cached_blocks == 3
    assert pools.attach_prefix(2, list(range(9))) == 4
    assert pools.attach_prefix(3, list(range(20, 29))) == 8
    assert not pools.reserve(2, 8)
    pools.check()
    pools.release(3)
    assert pools.reserve(2, 8)
    assert pools.cached_blocks == 2
    pools.check()


def test_blocks_behind_one_that_is_given_up_are_given_up_too():
    """Otherwise a row that publishes again caches its pages twice, and they never come back."""
    pools = make_pools((6,), num_pages=6)
    prompt = list(range(13))
    assert pools.reserve(0, 12)
    pools.publish(0, prompt, 12)
    pools.pass_window(0, 12)  # the row gives its first block back, so that only the cache has it
    assert pools.reserve(1, 16)
    assert pools.cached_blocks == 0
    pools.publish(0, prompt, 12)
    pools.release(0)
    pools.release(1)
    assert pools.used_pages == 0
    pools.drop_prefixes()
    pools.check()
    assert pools.free_pages == 6


def test_prefixes_of_windows_need_only_the_pages_that_are_seen():
    pools = make_pools((None, 6))
    prompt = list(range(17))
    pools.reserve(0, 16)
    pools.publish(0, prompt, 8)
    pools.pass_window(0, 12)
    pools.publish(0, prompt, 16)
    pools.pass_window(0, 16)
    assert pools.attach_prefix(1, prompt) == 16
    windowed = pools.groups[1]
    assert windowed.tables[1, :4].tolist()[:2] == [ABSENT, ABSENT]
    pools.check()
    late = make_pools((None, 6))
    late.reserve(0, 16)
    late.pass_window(0, 16)
    late.publish(0, prompt, 16)
    assert late.attach_prefix(1, prompt) == 16
    assert late.attach_prefix(2, prompt[:9]) == 0


def test_states_are_found_where_they_were_saved_and_nowhere_else():
    pools = make_pools((None, None), recurrent=(1,))
    prompt = list(range(13))
    rows = torch.tensor([0])
    pools.reserve(0, 12)
    pools.states.write((1, True), rows, torch.full((1, 2, 3), 4.0))
    pools.publish(0, prompt, 4)
    pools.states.write((1, True), rows, torch.full((1, 2, 3), 9.0))
    pools.publish(0, prompt, 10)
    assert pools.attach_prefix(1, prompt) == 4
    assert states_of(pools, 1, 1)[0, 0, 0] == 4.0
    pools.states.write((1, True), rows, torch.full((1, 2, 3), 12.0))
    pools.publish(0, prompt, 12)
    assert pools.attach_prefix(2, prompt) == 12
    assert states_of(pools, 1, 2, 3)[:, 0, 0].tolist() == [12.0, 0.0]
    pools.release(2)
    assert states_of(pools, 1, 2)[0, 0, 0] == 0.0
    pools.check()


def test_only_so_many_states_are_saved_and_stacks_without_pages_forget_too():
    pools = make_pools((None,), recurrent=(0,), num_pages=5)
    pools.states.write((0, True), torch.tensor([0]), torch.ones(1, 2))
    for start in range(4):
        pools.publish(0, list(range(start, start + 4)), 4)
    found = [pools.attach_prefix(1, list(range(start, start + 5))) for start in range(4)]
    assert found == [0, 4, 4, 4]
    for start in range(30, 40):
        pools.publish(0, list(range(start, start + 4)), 4)
    assert pools.cached_blocks == 5
    pools.check()


def test_saved_states_come_back_for_some_rows():
    pools = make_pools((None,), recurrent=(0,))
    before = pools.save_states([0, 1])
    rows = torch.tensor([0, 1, 2])
    pools.states.write((0, True), rows, torch.arange(3.0)[:, None] + 1)
    kept = pools.save_states([1, 2])
    assert kept.num_bytes == 8
    pools.states.write((0, True), rows, torch.zeros(3, 1))
    pools.restore_states([2], kept)
    assert states_of(pools, 0, 0, 1, 2).flatten().tolist() == [0.0, 0.0, 3.0]
    pools.restore_states(1, kept)
    assert states_of(pools, 0, 0, 1, 2).flatten().tolist() == [0.0, 2.0, 3.0]
    # Nothing was kept yet when the first snapshot was taken.
    pools.restore_states([0, 1], before)
    assert states_of(pools, 0, 0, 1, 2).flatten().tolist() == [0.0, 0.0, 3.0]
    assert pools.save_states(0, depths=[]).tensors == {}


def test_a_row_copied_out_comes_back_elsewhere():
    pools = make_pools((None, 6, None), recurrent=(2,))
    generator = torch.Generator().manual_seed(1)
    pools.reserve(1, 18)
    pools.pass_window(1, 14)
    for group in pools.groups:
        for plane in planes_of(pools, group):
            plane.copy_(torch.randn(plane.shape, generator=generator))
    pools.states.write((2, True), torch.tensor([1]), torch.full((1, 2), 5.0))
    expected = [plane[group.pages(1)].clone() for group in pools.groups for plane in planes_of(pools, group)]
    saved = pools.copy_out(1)
    assert saved.num_bytes == sum(each.nbytes for each in expected) + 8
    pools.release(1, spoiled=True)
    assert pools.reserve(0, 48)
    assert not pools.copy_in(2, saved)
    pools.check()
    pools.release(0)
    pools.reserve(0, 4)
    assert pools.copy_in(2, saved)
    pools.check()
    found = [plane[group.pages(2)] for group in pools.groups for plane in planes_of(pools, group)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert pools.groups[1].begins[2] == 2
    assert states_of(pools, 2, 2)[0, 0] == 5.0


def test_spoiled_pages_are_wiped_and_no_longer_offered():
    pools = make_pools((None,))
    prompt = list(range(9))
    pools.reserve(0, 8)
    (group,) = pools.groups
    pools.publish(0, prompt, 8)
    assert pools.attach_prefix(1, prompt[:5]) == 4
    for plane in planes_of(pools, group):
        plane.fill_(float("nan"))
    first, second = group.pages(0)
    pools.release(0, spoiled=True)
    pools.check()
    assert pools.attach_prefix(2, prompt) == 0
    for plane in planes_of(pools, group):
        assert not plane[second].any()
        # The page of another row is wiped when that row goes.
        assert plane[first].isnan().all()
    pools.release(1, spoiled=True)
    assert all(not plane[first].any() for plane in planes_of(pools, group))
    assert pools.free_pages == 12


@pytest.mark.parametrize("harm", ["count", "table", "free", "heap"])
def test_control_lost_pages_are_reported(harm):
    pools = make_pools((None,))
    pools.reserve(0, 8)
    pools.check()
    (group,) = pools.groups
    if harm == "count":
        group.counts[0] += 1
    elif harm == "table":
        group.tables[1, 0] = 0
    elif harm == "free":
        group.free[0] -= 1
    else:
        group._heaps[0].pop()
    with pytest.raises(AssertionError, match=r"pages of window None|of window None are"):
        pools.check()


def test_tokens_without_pages_are_refused():
    pools = make_pools((None,))
    pools.reserve(0, 4)
    spans = Spans(np.array([0]), np.array([4]), np.array([1]), True)
    store = pools.open(spans)
    key = torch.ones(1, 2, 1, 8)
    with pytest.raises(AssertionError, match="a token has no page"):
        store.memory(0).append(key, key, {})


class AnyUse(RuleBasedStateMachine):
    """Uses pools in any order; the pages of a row keep the numbers that were written for it."""

    windows: tuple[int | None, ...] = (None, 6)
    recurrent: tuple[int, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.pools = make_pools(self.windows, self.recurrent, num_pages=10)
        self.texts: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}
        self.away: list[tuple[Any, list[int], int]] = []

    def write(self, row: int, start: int, stop: int) -> None:
        """Writes each position's prefix number, so that a page shared wrongly is seen."""
        for group in self.pools.groups:
            for position in range(start, stop):
                page = group.tables[row, position // PAGE]
                assert group.counts[page] == 1, "a shared page was written"
                for plane in planes_of(self.pools, group):
                    plane[page, :, position % PAGE] = self.sign(row, position)

    def sign(self, row: int, position: int) -> float:
        return float(hash(tuple(self.texts[row][: position + 1])) % 10007)

    def seen(self, group: Any, row: int) -> range:
        first = 0 if group.window is None else max(0, self.done[row] - group.window + 1)
        return range(first, self.done[row])

    @rule(row=st.integers(0, ROWS - 1), kind=st.integers(0, 2), length=st.integers(1, 24))
    def begin(self, row: int, kind: int, length: int) -> None:
        if row in self.texts:
            return
        self.texts[row] = [kind] * (length // 2) + [5] * (length - length // 2)
        self.done[row] = self.pools.attach_prefix(row, self.texts[row])
        assert self.done[row] < length
        assert self.done[row] % PAGE == 0
        if self.recurrent and self.done[row]:
            assert states_of(self.pools, 2, row)[0, 0] == self.sign(row, self.done[row] - 1)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), count=st.integers(1, 9), publishes=st.booleans())
    def go_on(self, data: Any, count: int, publishes: bool) -> None:
        row = data.draw(st.sampled_from(sorted(self.texts)))
        text, start = self.texts[row], self.done[row]
        stop = min(start + count, len(text))
        if stop == start:
            text += [data.draw(st.integers(0, 2))] * count
            stop = len(text)
        before = self.pools.free_pages
        if not self.pools.reserve(row, stop):
            assert self.pools.free_pages == before
            return
        self.write(row, start, stop)
        self.done[row] = stop
        if self.recurrent:
            state = torch.full((1, 1), self.sign(row, stop - 1))
            self.pools.states.write((2, True), torch.tensor([row]), state)
        if publishes:
            self.pools.publish(row, text, stop)
        self.pools.pass_window(row, stop)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), spoiled=st.booleans())
    def release(self, data: Any, spoiled: bool) -> None:
        row = data.draw(st.sampled_from(sorted(self.texts)))
        self.pools.release(row, spoiled)
        del self.texts[row], self.done[row]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def go_away(self, data: Any) -> None:
        row = data.draw(st.sampled_from(sorted(self.texts)))
        self.away.append((self.pools.copy_out(row), self.texts.pop(row), self.done.pop(row)))
        self.pools.release(row)

    @precondition(lambda self: self.away and len(self.texts) < ROWS)
    @rule()
    def come_back(self) -> None:
        row = min(set(range(ROWS)) - set(self.texts))
        saved, text, done = self.away[0]
        if self.pools.copy_in(row, saved):
            self.away.pop(0)
            self.texts[row], self.done[row] = text, done

    @invariant()
    def holds(self) -> None:
        self.pools.check()
        for group in self.pools.groups:
            for row in self.texts:
                for position in self.seen(group, row):
                    page = group.tables[row, position // PAGE]
                    plane = planes_of(self.pools, group)[-1]
                    assert plane[page, 0, position % PAGE, 0] == self.sign(row, position)

    def teardown(self) -> None:
        for row in list(self.texts):
            self.pools.release(row)
        self.pools.drop_prefixes()
        self.pools.check()
        assert self.pools.free_pages == self.pools.settings.num_pages


class HybridUse(AnyUse):
    """With states beside pages."""

    windows = (None, 6, None)
    recurrent = (2,)


AnyUse.TestCase.settings = HybridUse.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None
)
TestAnyUse = AnyUse.TestCase
TestHybridUse = HybridUse.TestCase
