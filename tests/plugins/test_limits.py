"""vLLM's plugin refuses stacks that vLLM's attention layers cannot serve, by name."""

from collections.abc import Callable
from typing import Any

import pytest

from refold.blueprint.schema import Blueprint
from refold.errors import RefoldError
from refold.planning.build import build_blueprint
from refold.plugins.limits import require_servable, require_split, shared_depth
from refold.plugins.vllm.shares import Shares
from refold.recipe.recipe import Recipe

FOLD = {"loops": 2}
SERVED: dict[str, dict[str, Any]] = {
    "identity": {},
    "relaxed": {"fold": FOLD, "relax": {"rank": 2}},
    "dropped": {"drop": {"attention": {"layers": [1]}, "mlp": {"layers": [2]}}},
    "shared keys": {"fold": FOLD, "share_kv": {"from": "first_loop"}},
    "exits": {"fold": FOLD, "exits": {"at": [1]}},
    "narrower": {"width": {"mlp": 0.5, "heads": 0.5}},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mixer": (
        {"mixers": [{"depths": [3], "type": "gated_deltanet"}]},
        r"vllm: attention at every depth .*\(got depth 3: gated_deltanet\); serve it with refold's engine",
    ),
    "prefix": (
        {"fold": FOLD, "relax": {"type": "prefix", "length": 3}},
        r"vllm: attention to tokens alone is required \(got depth 0 has a prefix\)",
    ),
    "some heads": (
        {"share_kv": {"from": {"back": 2}, "heads": [0]}},
        r"vllm: keys and values of one depth is required \(got depth 2 reads heads \[0\] of depth 0",
    ),
    "own heads": (
        {"width": {"heads": [1, 2, 2, 1, 2, 2, 2, 2]}},
        r"vllm: the same number of key-value heads at every depth is required \(got 1, 2\); serve it with refold's",
    ),
    "own neurons": (
        {"width": {"mlp": [64, 32, 64, 64, 80, 80, 80, 80]}},
        r"vllm: the same number of neurons at every depth is required \(got 32, 64, 80\)",
    ),
}


@pytest.fixture
def make(make_arch: Callable[..., Any]) -> Callable[..., Blueprint]:
    def build(recipe: dict[str, Any], **fields: Any) -> Blueprint:
        return build_blueprint(make_arch(**fields), Recipe.model_validate(recipe)).blueprint

    return build


@pytest.mark.parametrize("recipe", SERVED.values(), ids=SERVED)
def test_attention_stacks_are_served(make: Callable[..., Blueprint], recipe: dict[str, Any]) -> None:
    require_servable(make(recipe))


@pytest.mark.parametrize("name", REFUSED)
def test_other_stacks_are_refused_by_name(make: Callable[..., Blueprint], name: str) -> None:
    recipe, message = REFUSED[name]
    with pytest.raises(RefoldError, match=message):
        require_servable(make(recipe))


def test_a_narrower_stack_is_split_by_its_own_sizes(make: Callable[..., Blueprint]) -> None:
    require_split(make({}), 2)
    with pytest.raises(RefoldError, match=r"a divisor of the MLP's width 35 is required \(got 2\)"):
        require_split(make({"width": {"mlp": [35] * 8}}), 2)


def test_rotary_embeddings_that_depend_on_the_text_are_refused(make: Callable[..., Blueprint]) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 4.0}
    with pytest.raises(RefoldError, match=r"depth 0 has rope kind dynamic, which depends on the length of the text"):
        require_servable(make({}, rope_parameters=rope, max_position_embeddings=16))


def test_sharing_names_the_depth_that_makes_the_keys(make: Callable[..., Blueprint]) -> None:
    blueprint = make(SERVED["shared keys"])
    assert [shared_depth(blueprint, index) for index in (0, 3, 4, 7)] == [None, None, 0, 3]


@pytest.mark.parametrize(
    ("shares", "fields", "message"),
    [
        (3, {}, r"tensor_parallel_size: a divisor of 4 attention heads is required \(got 3\)"),
        (4, {"num_attention_heads": 12, "num_key_value_heads": 6}, r"a divisor or a multiple of 6 key-value heads"),
        (4, {"intermediate_size": 81}, r"a divisor of the MLP's width 81 is required \(got 4\)"),
        (2, {"model_type": "olmo2"}, r"1 is required where queries are normed over all heads at once \(olmo2; got 2\)"),
    ],
)
def test_sizes_that_cannot_be_split_are_refused(
    make: Callable[..., Blueprint], shares: int, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefoldError, match=message):
        require_split(make({}, **{"hidden_size": 48, **fields}), shares)


def test_one_process_splits_nothing(make: Callable[..., Blueprint]) -> None:
    require_split(make({}, model_type="olmo2", intermediate_size=81), 1)


@pytest.mark.parametrize(("size", "rows"), [(2, [(0, 8), (8, 16)]), (4, [(0, 8), (0, 8), (8, 16), (8, 16)])])
def test_processes_have_whole_key_value_heads(
    make_arch: Callable[..., Any], size: int, rows: list[tuple[int, int]]
) -> None:
    shares = [Shares(make_arch(), rank, size).wide("k_proj") for rank in range(size)]
    assert [(each.start, each.stop) for each in shares] == rows
    queries = [Shares(make_arch(), rank, size).wide("o_proj") for rank in range(size)]
    assert queries[0].start == 0
    assert queries[-1].stop == 32
