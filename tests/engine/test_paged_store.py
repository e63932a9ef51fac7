"""Hidden states of launches over pages equal those of a plain forward pass, for any cut of the work into launches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refold.conversion.convert import ConvertOptions, convert
from refold.engine.page_keeper import LocalKeeper
from refold.engine.page_plan import Spans
from refold.engine.pages import PoolSettings
from refold.engine.pools import Pools
from refold.errors import RefoldError
from refold.modeling.load import load_model
from refold.modeling.rows import RowRange

FOLD = {"loops": 2, "init": "average"}
STACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "source": ("llama", {}),
    "strict": ("llama", {"fold": FOLD}),
    "relaxed": ("llama", {"fold": FOLD, "relax": {"rank": 3, "vectors": "tied"}}),
    "own vectors": ("llama", {"fold": FOLD, "relax": {"rank": 3, "vectors": "own", "gain": "own"}}),
    "low rank": ("llama", {"factor": {"parameters": 0.6, "weight": "none"}}),
    "no attention": ("llama", {"drop": {"attention": {"count": 4}}}),
    "basis": ("llama", {"fold": FOLD, "factor": {"parameters": 0.6, "share": "basis", "weight": "none"}}),
    "prefix": ("llama", {"fold": FOLD, "relax": {"type": "prefix", "length": 3, "vectors": "own"}}),
    "keys of the first loop": ("llama", {"fold": FOLD, "share_kv": {"from": "first_loop"}}),
    "some heads": ("llama", {"fold": FOLD, "share_kv": {"from": "first_loop", "heads": [1]}}),
    "prefix and some heads": (
        "llama",
        {
            "fold": FOLD,
            "relax": {"type": "prefix", "length": 3},
            "share_kv": {"from": "first_loop", "heads": [1]},
        },
    ),
    "dropped": ("llama", {"drop": {"attention": {"layers": [0]}, "mlp": {"layers": [1, 2]}}}),
    "window": ("mistral-window", {"fold": FOLD, "relax": {"rank": 3}}),
    "window of some": ("qwen2-window", {}),
    "soft-cap": ("gemma2", {"fold": FOLD}),
    "soft-cap and prefix": ("gemma2", {"fold": FOLD, "relax": {"type": "prefix", "length": 3}}),
    "parallel": ("gpt_neox", {"fold": FOLD, "relax": {"rank": 3}}),
    "two windows": ("gemma3_text", {}),
}
TIED = {"fold": FOLD, "relax": {"rank": 3, "vectors": "tied"}}
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "retention": ("llama", {"mixers": [{"type": "retention"}]}),
    "retention folded": ("llama", {"mixers": [{"type": "retention"}], **TIED}),
    "retention hybrid": ("llama", {"mixers": [{"type": "retention", "except": [1]}]}),
    "mamba": ("llama", {"mixers": [{"type": "mamba", "transfer": ["mlp"], "except": [3]}]}),
    "mamba2 folded": ("llama", {"mixers": [{"type": "mamba2"}], **TIED}),
    "gla": ("gpt_neox", {"mixers": [{"type": "gla", "except": [0]}]}),
    "gated deltanet": ("llama", {"mixers": [{"type": "gated_deltanet", "except": [2]}]}),
    "gated deltanet folded": ("llama", {"mixers": [{"type": "gated_deltanet"}], **TIED}),
    "gated deltanet beside windows": ("mistral-window", {"mixers": [{"type": "gated_deltanet", "except": [1, 3]}]}),
    "linear attention": ("llama", {"mixers": [{"type": "linear_attention", "except": [0]}]}),
    "linear attention with a window": ("llama", {"mixers": [{"type": "linear_attention", "window": 5}]}),
}


def far(one: Tensor, other: Tensor) -> float:
    """Largest difference, beside the largest number."""
    return float((one - other).detach().abs().max() / other.detach().abs().max())


@pytest.fixture(scope="session")
def load(make_source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Loads the fold of a tiny source, all of whose tensors count."""
    made: dict[str, Any] = {}

    def make(variant: str, recipe: Mapping[str, Any], dtype: str = "float32", **fields: Any) -> Any:
        key = repr((variant, recipe, dtype, sorted(fields.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("folded") / variant
            convert(make_source(variant, **fields), folder, recipe, options=ConvertOptions(allow_larger=True))
            model, generator = load_model(folder, device="cpu"), torch.Generator().manual_seed(5)
            for name, weight in model.named_parameters():
                is_fresh = name.startswith("model.mixers.") and "mixers" in recipe and weight.ndim > 1
                if is_fresh or any(kind in name for kind in (".lora.", ".vectors.", ".gain.", ".prefix")):
                    weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
            made[key] = model.model.to(getattr(torch, dtype))
        return made[key]

    return make


@dataclass
class Item:
    """A span of one row on its way through the stack."""

    row: int
    start: int
    length: int
    stage: int = 0
    stream: Tensor | None = None


def place_of(item: Item) -> tuple[int, int, int]:
    """Row, first position and number of tokens."""
    return item.row, item.start, item.length


@dataclass
class Runner:
    """Runs spans of rows through the stages of a stack, in launches of any mixture."""

    model: Any
    pools: Pools
    stages: list[range]
    flat: bool
    texts: dict[int, Tensor]
    done: dict[int, int] = field(default_factory=dict)
    found: dict[int, list[Tensor]] = field(default_factory=dict)
    mixed_launches: int = 0

    def begin(self, row: int, length: int) -> Item:
        """Begins the next span of a row."""
        start = self.done.get(row, 0)
        assert self.pools.reserve(row, start + length)
        tokens = self.texts[row][start : start + length]
        stream = self.model.embed_tokens(tokens[None])
        return Item(row, start, length, 0, stream * self.model.embedding_scale)

    @torch.no_grad()
    def launch(self, items: list[Item]) -> None:
        """Runs one stage of each item, which stand in order of their stages."""
        streams = [item.stream for item in items if item.stream is not None]
        assert len(streams) == len(items)
        flat = [each.transpose(0, 1) for each in streams] if self.flat else streams
        hidden = torch.cat(flat)
        rows, starts, lengths = (np.array(column) for column in zip(*map(place_of, items), strict=True))
        store = self.pools.open(Spans(rows, starts, lengths, self.flat))
        positions = [torch.arange(item.start, item.start + item.length)[None] for item in items]
        places = torch.cat([each.transpose(0, 1) for each in positions] if self.flat else positions)
        batch = self.model.batch(hidden, position_ids=places, cache=store)
        sizes = [item.length if self.flat else 1 for item in items]
        ranges: list[RowRange] = []
        for item, size in zip(items, sizes, strict=True):
            if ranges and ranges[-1].depths == self.stages[item.stage]:
                ranges[-1] = RowRange(ranges[-1].depths, ranges[-1].num_rows + size)
            else:
                ranges.append(RowRange(self.stages[item.stage], size))
        if len(ranges) == 1:
            hidden = self.model.run(ranges[0].depths, hidden, batch, store).hidden_states
        else:
            self.mixed_launches += 1
            hidden = self.model.run_rows(ranges, hidden, batch, store)
        for item, stream in zip(items, hidden.split(sizes), strict=True):
            item.stream = stream.transpose(0, 1) if self.flat else stream
            item.stage += 1
            if item.stage == len(self.stages):
                self.found.setdefault(item.row, []).append(self.model.norm(item.stream))
                self.done[item.row] = item.start + item.length
                self.pools.pass_window(item.row, self.done[item.row])

    def compare(self) -> float:
        """Returns the largest difference from a plain pass over each row."""
        worst = 0.0
        for row, pieces in self.found.items():
            found = torch.cat(pieces, dim=1)
            text = self.texts[row][: self.done[row]]
            with torch.no_grad():
                expected = self.model(text[None]).last_hidden_state[:, -found.shape[1] :]
            worst = max(worst, far(found, expected))
        return worst


def texts(num_rows: int, length: int = 48) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {row: torch.randint(2, 95, (length,), generator=generator) for row in range(num_rows)}


def is_mixable(model: Any, one: range, other: range) -> bool:
    """Says whether the stages run the same parts with the same structure."""
    for first, second in zip(one, other, strict=True):
        depths = model.depths[first], model.depths[second]
        specs = [(each.spec.mixer, each.spec.mlp, each.spec.window, each.spec.rope) for each in depths]
        made = [None if each.heads is None or each.heads.makes_all else each.heads.made for each in depths]
        if specs[0] != specs[1] or made[0] != made[1]:
            return False
    return True


def run_schedule(model: Any, pools: Pools, draw: Callable[[int, int], int], flat: bool, num_launches: int) -> Runner:
    """Runs launches whose spans, lengths and stages are drawn."""
    blueprint = model.config.read_blueprint()
    half = blueprint.num_depths // 2
    stages = [range(half), range(half, 2 * half)]
    mixable = is_mixable(model, *stages)
    runner = Runner(model, pools, stages, flat, texts(4))
    waiting: list[Item] = []
    for _ in range(num_launches):
        busy = {item.row for item in waiting}
        lengths = {1: 1, 2: 1, 3: 2, 4: 3, 5: 5, 6: 11, 7: 17}
        common = lengths[draw(1, 7)]
        fresh: list[Item] = []
        for row in range(4):
            length = lengths[draw(1, 7)] if flat else common
            if row not in busy and draw(0, 2) and runner.done.get(row, 0) + length <= 48:
                fresh.append(runner.begin(row, length))
        late = [item for item in waiting if draw(0, 1)]
        if late and fresh and mixable and (flat or late[0].length == common):
            late = [item for item in late if flat or item.length == common]
            runner.launch([*fresh, *late])
            done = late
        else:
            if fresh:
                runner.launch(fresh)
            done = late
            for length in sorted({item.length for item in late}):
                runner.launch([item for item in late if item.length == length])
        waiting = [item for item in (*waiting, *fresh) if item not in done]
    for item in waiting:
        runner.launch([item])
    return runner


def make_pools(model: Any, **fields: Any) -> Pools:
    fields = {"num_pages": 64, "max_rows": 6, "page_size": 4, **fields}
    return Pools(model.config.read_blueprint(), PoolSettings(**fields))


@pytest.mark.parametrize("name", STACKS)
@settings(max_examples=4)
@given(data=st.data())
def test_any_schedule_gives_the_hidden_states_of_a_plain_pass(load, name, data):
    model = load(*STACKS[name])
    pools = make_pools(model)
    runner = run_schedule(model, pools, lambda low, high: data.draw(st.integers(low, high)), True, 12)
    assert runner.compare() < 1e-5
    for row in range(4):
        pools.release(row)
    pools.check()
    assert pools.used_pages == 0


@pytest.mark.parametrize("name", RECURRENT)
@settings(max_examples=4)
@given(data=st.data())
def test_states_of_rows_go_on_in_any_schedule(load, name, data):
    # Recurrences in float32 carry rounding from token to token, by more than the tolerance; the gates and
    # decays of gated deltanet are float32 even here, and have shown a difference of 1.06e-5.
    model = load(*RECURRENT[name], dtype="float64")
    pools = make_pools(model, dtype=torch.float64)
    runner = run_schedule(model, pools, lambda low, high: data.draw(st.integers(low, high)), False, 12)
    assert runner.compare() < 2e-5
    for row in range(4):
        pools.release(row)
    pools.check()


def run_rows_of(runner: Runner, spans: Mapping[int, int]) -> None:
    """Runs the next tokens of rows through all stages, in one launch each."""
    items = [runner.begin(row, length) for row, length in spans.items()]
    for _ in runner.stages:
        runner.launch(items)


def make_runner(model: Any, pools: Pools, flat: bool = True) -> Runner:
    half = model.config.read_blueprint().num_depths // 2
    return Runner(model, pools, [range(half), range(half, 2 * half)], flat, texts(6))


@pytest.mark.parametrize("name", ["relaxed", "some heads", "window", "soft-cap and prefix", "parallel"])
@torch.no_grad()
def test_rows_with_common_pages_read_them_once(load, name):
    model = load(*STACKS[name])
    pools = make_pools(model, num_pages=80)
    runner = make_runner(model, pools)
    common, own = runner.texts[0][:17], runner.texts
    runner.texts = {row: torch.cat((common[: 17 - 5 * (row > 3)], text[:20])) for row, text in own.items()}
    run_rows_of(runner, {0: 17, 5: 30})
    pools.publish(0, runner.texts[0].tolist(), 17)
    for row in (1, 2, 3, 4):
        runner.done[row] = pools.attach_prefix(row, runner.texts[row].tolist())
    # A window had passed the pages that a prefix of 12 tokens needs.
    shorter = 0 if any(group.window for group in pools.groups) else 12
    assert [runner.done[row] for row in (1, 2, 3, 4)] == [16, 16, 16, shorter]
    for spans in (dict.fromkeys(range(6), 1), dict.fromkeys(range(5), 3), {0: 1, 1: 1, 4: 16}, {2: 2, 3: 2}):
        run_rows_of(runner, spans)
    assert runner.compare() < 1e-5
    for row in range(6):
        pools.release(row)
    pools.check()


@pytest.mark.parametrize("name", ["gated deltanet", "mamba", "linear attention with a window", "retention"])
@torch.no_grad()
def test_states_of_prefixes_are_found(load, name):
    model = load(*RECURRENT[name], dtype="float64")
    pools = make_pools(model, dtype=torch.float64)
    runner = make_runner(model, pools, flat=False)
    runner.texts = {row: torch.cat((runner.texts[0][:9], text[:9])) for row, text in runner.texts.items()}
    for length in (8, 3):
        run_rows_of(runner, {0: length})
        pools.publish(0, runner.texts[0].tolist(), runner.done[0])
    runner.done[1] = pools.attach_prefix(1, runner.texts[1].tolist())
    assert runner.done[1] == 8
    run_rows_of(runner, {0: 2, 1: 2})
    assert runner.compare() < 1e-5
    # Rejected drafts: states go back, and pages are written again.
    snapshot, kept = pools.save_states([0, 1]), {row: list(pieces) for row, pieces in runner.found.items()}
    run_rows_of(runner, {0: 3, 1: 3})
    pools.restore_states([0, 1], snapshot)
    runner.found, runner.done = kept, {0: 13, 1: 10}
    run_rows_of(runner, {0: 2, 1: 2})
    assert runner.compare() < 1e-5
    run_rows_of(runner, {0: 1, 1: 1})
    pools.restore_states([0, 1], snapshot)
    run_rows_of(runner, {0: 1, 1: 1})
    assert runner.compare() > 1e-3


@pytest.mark.parametrize("name", ["relaxed", "window", "prefix", "window of some"])
@torch.no_grad()
def test_scattered_pages_and_rows_copied_out_give_the_same(load, name):
    model = load(*STACKS[name])
    pools = make_pools(model, num_pages=200)
    runner = make_runner(model, pools)
    for step in range(6):
        # Rows take pages in turn, so that those of one or two rows lie far apart.
        run_rows_of(runner, dict.fromkeys(range(6), 5 if step else 3))
    run_rows_of(runner, {0: 1, 5: 1})
    run_rows_of(runner, {3: 1})
    run_rows_of(runner, {2: 16})
    saved = pools.copy_out(1)
    pools.release(1, spoiled=True)
    pools.reserve(4, 48)
    assert pools.copy_in(1, saved)
    run_rows_of(runner, {1: 2, 4: 2})
    assert runner.compare() < 1e-5


@torch.no_grad()
def test_a_row_with_numbers_that_are_not_finite_harms_no_other(load):
    model = load(*STACKS["relaxed"])
    pools = make_pools(model, num_pages=12)
    runner = make_runner(model, pools)
    run_rows_of(runner, {0: 5, 1: 5, 2: 5})
    items = [runner.begin(row, 1) for row in range(3)]
    spoiled = items[1].stream
    assert spoiled is not None
    items[1].stream = spoiled * float("nan")
    for _ in runner.stages:
        runner.launch(items)
    assert runner.found.pop(1)[-1].isnan().all()
    run_rows_of(runner, {0: 1, 2: 1})
    assert runner.compare() < 1e-5
    pools.release(1, spoiled=True)
    runner.done[3] = 0
    run_rows_of(runner, {3: 1})
    run_rows_of(runner, {0: 6, 2: 6, 3: 6})
    assert runner.compare() < 1e-5


def fill_second_half(model: Any, pools: Pools, skipped: list[int]) -> tuple[Tensor, Tensor]:
    """Runs a row whose first tokens leave at half depth; returns its stream and that of a plain computation."""
    text, depths = texts(1)[0][:14], model.config.read_blueprint().num_depths
    half = depths // 2
    pools.reserve(0, 14)
    found = []
    for start, stop in ((0, 8), (8, 14)):
        stream = model.embed_tokens(text[None, start:stop]).transpose(0, 1) * model.embedding_scale
        store = pools.open(Spans(np.array([0]), np.array([start]), np.array([stop - start]), True))
        batch = model.batch(stream, position_ids=torch.arange(start, stop)[:, None], cache=store)
        stream = model.run(range(half), stream, batch, store).hidden_states
        if start:
            stream = model.run(range(half, depths), stream, batch, store).hidden_states
            found.append(stream.transpose(0, 1))
        else:
            for index in skipped:
                model.fill(index, [RowRange(range(half, depths), stop)], stream, batch, store)
    # Without a cache: deeper depths see the exit's stream at tokens that left.
    stream = model.embed_tokens(text[None]) * model.embedding_scale
    batch = model.batch(stream)
    stream, shared = model.run(range(half), stream, batch)
    left = stream[:, :8]
    for index in range(half, depths):
        stream, shared = model.run(range(index, index + 1), stream, batch, shared=shared)
        stream = torch.cat((left, stream[:, 8:]), dim=1)
    return found[0], stream[:, 8:]


@pytest.mark.parametrize("name", ["strict", "relaxed", "own vectors", "some heads", "prefix", "window", "soft-cap"])
@torch.no_grad()
def test_keys_of_skipped_depths_are_filled_from_the_exit(load, name):
    model = load(*STACKS[name])
    found, expected = fill_second_half(model, make_pools(model), [2, 3])
    assert far(found, expected) < 1e-5
    without, _ = fill_second_half(model, make_pools(model), [2])
    assert far(without, expected) > 1e-3


@torch.no_grad()
def test_depths_that_make_no_keys_are_filled_without_effect_and_states_are_refused(load):
    model = load(*STACKS["keys of the first loop"])
    found, expected = fill_second_half(model, make_pools(model), [2, 3])
    # Keys come from the first loop, so that skipped depths leave nothing behind.
    without, _ = fill_second_half(model, make_pools(model), [])
    assert torch.equal(found, without)
    assert far(found, expected) < 1e-5
    recurrent = load(*RECURRENT["linear attention"])
    stream = torch.zeros(1, 1, 32)
    store = make_pools(recurrent).open(Spans(np.array([0]), np.array([0]), np.array([1]), False))
    with pytest.raises(RefoldError, match=r"fill: a mixer that keeps keys and values is required \(got LinearAtt"):
        recurrent.fill(1, [RowRange(range(1, 2), 1)], stream, recurrent.batch(stream), store)


@pytest.mark.parametrize("harm", ["plane", "table", "row", "position"])
@torch.no_grad()
def test_control_the_wrong_pages_are_seen(load, harm):
    model = load(*STACKS["strict"])
    pools = make_pools(model)
    runner = make_runner(model, pools)
    run_rows_of(runner, {0: 7, 1: 7})
    (group,) = pools.groups
    if harm == "plane":
        assert isinstance(pools.keeper, LocalKeeper)
        keys = pools.keeper.keys
        keys[0], keys[2] = keys[2], keys[0]
    elif harm == "table":
        group.tables[0, :2] = group.tables[0, [1, 0]]
    elif harm == "row":
        group.tables[[0, 1]] = group.tables[[1, 0]]
    items = [runner.begin(row, 1) for row in range(2)]
    for item in items:
        item.start -= harm == "position"
    for _ in runner.stages:
        runner.launch(items)
    runner.done = {0: 8, 1: 8}
    assert runner.compare() > 1e-3


@torch.no_grad()
def test_rows_at_depths_of_other_heads_are_refused(load):
    model = load(*STACKS["keys of the first loop"])
    pools = make_pools(model)
    for row in range(2):
        pools.reserve(row, 1)
    stream = torch.zeros(2, 1, 32)
    store = pools.open(Spans(np.array([0, 1]), np.array([0, 0]), np.array([1, 1]), True))
    batch = model.batch(stream, position_ids=torch.zeros(2, 1, dtype=torch.long), cache=store)
    ranges = [RowRange(range(2), 1), RowRange(range(2, 4), 1)]
    with pytest.raises(
        RefoldError, match=r"rows: depths that all have prefixes or none.* makes all, depth 2 0 and \(\)"
    ):
        model.run_rows(ranges, stream, batch, store)


@pytest.mark.parametrize("sharing", [{"from": "first_loop"}, {"from": "first_loop", "heads": [1]}])
@torch.no_grad()
def test_rows_at_two_later_loops_read_keys_of_the_first(load, sharing):
    recipe = {"fold": {"loops": 3}, "share_kv": sharing, "relax": {"rank": 2, "vectors": "own"}}
    model = load("llama", recipe, num_hidden_layers=6)
    pools = make_pools(model)
    runner = Runner(model, pools, [range(2), range(2, 4), range(4, 6)], True, texts(4))
    for step in range(4):
        items = [runner.begin(row, 3 if step else 4 + row) for row in range(4)]
        early, late = items[:2], items[2:]
        runner.launch(items)
        runner.launch(late)
        runner.launch([*early, *late])
        runner.launch(early)
    assert runner.mixed_launches == 4
    assert runner.compare() < 1e-5


@torch.no_grad()
def test_half_precision_is_near(load):
    model = load(*STACKS["relaxed"])
    low = torch.bfloat16
    pools = make_pools(model, dtype=low)
    generator = torch.Generator().manual_seed(2)
    key, value = (torch.randn(6, 2, 1, 8, generator=generator).to(low) for _ in range(2))
    query = torch.randn(6, 4, 1, 8, generator=generator).to(low)
    pools.reserve(0, 6)
    positions = np.arange(6)
    for position in positions:
        store = pools.open(Spans(np.array([0]), positions[position : position + 1], np.array([1]), True))
        memory = store.memory(0)
        memory.append(key[position : position + 1], value[position : position + 1], {})
        found = memory.attend(model.depths[0].view, query[position : position + 1])
        keys, values = (each[: position + 1, :, 0].transpose(0, 1).float() for each in (key, value))
        asked = query[position].float().view(2, 2, 8)
        expected = ((asked @ keys.mT) * 8**-0.5).softmax(-1) @ values
        assert far(found.float().view(2, 2, 8), expected) < 2e-2
