"""Ranges of depths, and rows that stand at different depths, run together."""

from typing import Any

import pytest
import torch
from torch import Tensor

from refold.errors import RefoldError
from refold.modeling.rows import RowRange
from refold.nn.mixers.memory import CacheStore

FOLD = {"loops": 2, "init": "average"}
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"fold": FOLD, "relax": {"rank": 3, "vectors": "tied"}},
    "lora and vectors": {"fold": FOLD, "relax": {"rank": 3, "vectors": "own"}},
    "gains": {"fold": FOLD, "relax": {"rank": 3, "vectors": "own", "gain": "own"}},
    "coefficients": {"fold": FOLD, "factor": {"parameters": 0.6, "share": "basis", "weight": "none"}},
    "strict": {"fold": FOLD},
}
TOLERANCE = 1e-9


def far(one: Tensor, other: Tensor) -> float:
    """Largest difference, beside the largest number."""
    return float((one - other).detach().abs().max() / other.detach().abs().max())


@pytest.fixture
def load_any(load):
    """Loads a converted model whose adapters and vectors all count."""

    def make(variant: str, recipe: dict[str, Any]) -> Any:
        model, generator = load(variant, recipe), torch.Generator().manual_seed(5)
        for name, weight in model.named_parameters():
            if any(kind in name for kind in (".lora.", ".vectors.", ".gain.")):
                weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
        return model

    return make


@pytest.fixture
def streams() -> Tensor:
    """Five rows of seven hidden states."""
    return torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_ranges_one_after_the_other_are_the_whole_stack(load_any, tokens, name):
    model = load_any("llama", RECIPES[name])
    expected = model.model(tokens).last_hidden_state
    stream = model.model.embed_tokens(tokens)
    batch = model.model.batch(stream)
    for depths in (range(1), range(1, 3), range(3, 4)):
        stream = model.model.run(depths, stream, batch).hidden_states
    assert torch.equal(model.model.norm(stream), expected)


@torch.no_grad()
def test_a_range_reads_the_keys_that_an_earlier_range_made(load, tokens):
    model = load("llama", {"fold": FOLD, "share_kv": {"from": "first_loop"}})
    expected = model.model(tokens).last_hidden_state
    stream = model.model.embed_tokens(tokens)
    batch = model.model.batch(stream)
    first = model.model.run(range(2), stream, batch)
    assert set(first.shared) == {0, 1}
    second = model.model.run(range(2, 4), first.hidden_states, batch, shared=first.shared)
    assert torch.equal(model.model.norm(second.hidden_states), expected)
    with pytest.raises(KeyError):
        model.model.run(range(2, 4), first.hidden_states, batch, shared={})


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_rows_at_different_depths_of_a_loop_are_each_alone(load_any, streams, variant, name):
    if variant == "gemma2" and name != "strict":
        pytest.skip("its loops have one window each, so depths of two loops differ")
    # In float64: in float32 the rounding of some processors exceeds the tolerance.
    model, streams = load_any(variant, RECIPES[name]).model.double(), streams.double()
    if variant == "gemma2":
        assert {each.spec.window for each in model.depths} != {None}
    batch = model.batch(streams)
    calls: list[int] = []
    hooks = [part.register_forward_hook(lambda *_: calls.append(1)) for part in (*model.mixers, *model.mlps)]
    found = model.run_rows([RowRange(range(2), 2), RowRange(range(2, 4), 3)], streams, batch)
    assert len(calls) == 4
    for hook in hooks:
        hook.remove()
    for row in range(5):
        depths = range(2) if row < 2 else range(2, 4)
        alone = streams[row : row + 1]
        expected = model.run(depths, alone, model.batch(alone)).hidden_states
        assert far(found[row : row + 1], expected) < TOLERANCE
        other = range(2, 4) if row < 2 else range(2)
        if name != "strict":
            assert far(found[row : row + 1], model.run(other, alone, model.batch(alone)).hidden_states) > 1e-3


@torch.no_grad()
def test_control_with_the_loras_of_two_loops_exchanged_rows_differ(load_any, streams):
    model = load_any("llama", RECIPES["lora"]).model
    rows = [RowRange(range(2), 2), RowRange(range(2, 4), 3)]
    before = model.run_rows(rows, streams, model.batch(streams))
    for first, second in ((0, 2), (1, 3)):
        model.depths[first].lora, model.depths[second].lora = model.depths[second].lora, model.depths[first].lora
    after = model.run_rows(rows, streams, model.batch(streams))
    assert all(far(one, other) > 1e-3 for one, other in zip(before, after, strict=True))


def test_depths_that_differ_in_more_than_adapters_are_refused(load, streams):
    model = load("llama", {}).model
    batch = model.batch(streams)
    with pytest.raises(
        RefoldError, match=r"rows: depths that run the same parts alike.*\(depth 0 has mixer 0, depth 2 2"
    ):
        model.run_rows([RowRange(range(2), 2), RowRange(range(2, 4), 3)], streams, batch)
    with pytest.raises(RefoldError, match=r"rows: ranges of one length for all 5 rows .*\(got 2 rows at 0\.\.1"):
        model.run_rows([RowRange(range(2), 2)], streams, batch)
    prefixed = load("llama", {"fold": FOLD, "relax": {"type": "prefix", "length": 3}}).model
    with pytest.raises(RefoldError, match=r"rows: .*without prefixes.*\(depth 0 has some\)"):
        prefixed.run_rows([RowRange(range(2), 2), RowRange(range(2, 4), 3)], streams, prefixed.batch(streams))
    tied = load("llama", {"fold": FOLD, "mixers": [{"type": "mamba2"}], "relax": {"rank": 2, "vectors": "own"}}).model
    with pytest.raises(RefoldError, match=r"rows: .*norms and biases .*\(depth 0 has"):
        tied.run_rows([RowRange(range(2), 2), RowRange(range(2, 4), 3)], streams, tied.batch(streams))
    strict = load("llama", {"fold": FOLD}).model
    with pytest.raises(RefoldError, match=r"store: rows at several depths .*\(got CacheStore\)"):
        strict.run_rows(
            [RowRange(range(2), 2), RowRange(range(2, 4), 3)], streams, strict.batch(streams), CacheStore(None)
        )


@pytest.mark.parametrize(
    "recipe",
    [
        {"fold": FOLD, "relax": {"rank": 3}, "exits": {"at": [0, 1, 2], "norm": "own", "head_rank": 2, "gate": True}},
        {"fold": FOLD},
        {"mixers": [{"type": "gla"}]},
    ],
    ids=["exits", "plain", "recurrent"],
)
@torch.no_grad()
def test_each_row_leaves_the_stack_at_its_own_depth(load, tokens, recipe):
    model = load("llama", recipe)
    for name, weight in model.named_parameters():
        if ".exits." in name:
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    rows = torch.cat((tokens, tokens.flip(1)))
    leaving = torch.tensor([2, 4, 1, 2])
    found = model(rows, exit_depth=leaving).logits
    hidden = model.model(rows, exit_depth=leaving).last_hidden_state
    for row, depths in enumerate(leaving.tolist()):
        alone = rows[row : row + 1]
        assert far(found[row : row + 1], model(alone, exit_depth=depths).logits) < 2e-6
        assert far(hidden[row : row + 1], model.model(alone, exit_depth=depths).last_hidden_state) < 2e-6
    assert far(found[:1], model(rows[:1]).logits) > 1e-2
    with pytest.raises(RefoldError, match=r"exit_depth: one number for each of the 4 rows is required \(got 2\)"):
        model(rows, exit_depth=leaving[:2])
    with pytest.raises(RefoldError, match=r"exit_depth: must lie in 1\.\.4 \(got 5\)"):
        model(rows, exit_depth=leaving + 1)


@torch.no_grad()
def test_rows_are_generated_each_from_its_own_exit(load, tokens):
    model = load("llama", {"fold": FOLD, "exits": {"at": "loops"}})
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(tokens, exit_depth=torch.tensor([2, 4]), **options)
    for row, depths in enumerate((2, 4)):
        alone = model.generate(tokens[row : row + 1], exit_depth=depths, **options)
        assert torch.equal(found[row : row + 1], alone)
    assert not torch.equal(found[:1], model.generate(tokens[:1], **options))
