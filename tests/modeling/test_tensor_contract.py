"""A model stores exactly the tensors of its blueprint."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from refold.blueprint.owned.registry import OWNED
from refold.blueprint.tensors import target_tensors
from refold.errors import RecipeError
from refold.families.registry import read_arch
from refold.modeling.configuration import RefoldConfig
from refold.modeling.model import RefoldForCausalLM
from refold.planning.build import build_blueprint
from refold.recipe.load import load_recipe
from refold.recipe.recipe import Recipe

LINEARS = ("q_proj", "o_proj", "up_proj", "down_proj", "mixer", "mlp", "all")
CONFIG = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
}
KINDS = (
    {"model_type": "llama", "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    {"model_type": "mistral", "num_key_value_heads": 1, "tie_word_embeddings": True, "sliding_window": 3},
    {"model_type": "gpt_neox", "attention_bias": False},
    {"model_type": "gpt_neox"},
    {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8},
    {"model_type": "gemma2", "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 3},
    {"model_type": "olmo2"},
)

ranks = st.one_of(
    st.integers(1, 20), st.just("full"), st.dictionaries(st.sampled_from(LINEARS), st.integers(0, 9), min_size=1)
)
folds = st.fixed_dictionaries(
    {"loops": st.integers(1, 3)},
    optional={
        "pattern": st.sampled_from(["cycle", "sequence", "cycle_reversed"]),
        "init": st.sampled_from(["stepwise", "average", "lower", "upper", "random"]),
        "tie": st.sampled_from([["mixer"], ["mlp"], ["mixer", "mlp"]]),
        "prelude": st.integers(0, 2),
        "coda": st.integers(0, 2),
        "uneven": st.sampled_from(["drop", "prelude"]),
    },
)
loras = st.fixed_dictionaries(
    {"rank": ranks},
    optional={
        "init": st.sampled_from(["svd", "zero", "joint"]),
        "vectors": st.sampled_from(["own", "tied"]),
        "gain": st.sampled_from(["own", "tied"]),
    },
)
prefixes = st.fixed_dictionaries(
    {"type": st.just("prefix"), "length": st.integers(1, 5)}, optional={"at": st.sampled_from(["all", "tied"])}
)
relaxes = loras | prefixes
drops = st.fixed_dictionaries(
    {},
    optional={
        "attention": st.fixed_dictionaries({"count": st.integers(0, 6)}),
        "mlp": st.fixed_dictionaries({"count": st.integers(0, 6)}),
        "block": st.fixed_dictionaries({"count": st.integers(0, 3)}),
    },
)
swaps = st.fixed_dictionaries(
    {"type": st.sampled_from(["retention", "mamba", "mamba2", "gla", "gated_deltanet", "linear_attention"])},
    optional={
        "except": st.sampled_from([[0], "xatl", {"every": 2}]),
        "transfer": st.sampled_from([[], ["o_proj", "mlp"]]),
    },
).filter(lambda swap: not (swap["type"] == "mamba" and "o_proj" in swap.get("transfer", ["o_proj"])))
shares = st.sampled_from(
    [
        {"from": "first_loop"},
        {"from": "pairs"},
        {"from": {"back": 2}, "heads": [0]},
        [{"depth": 4, "from": 1}, {"depth": 5, "from": 4}],
    ]
)
recipes = st.fixed_dictionaries(
    {},
    optional={
        "fold": folds,
        "relax": relaxes,
        "drop": drops,
        "mixers": st.lists(swaps, min_size=1, max_size=1),
        "share_kv": shares,
        "factor": st.sampled_from([{"parameters": 0.5}, {"parameters": 0.8, "share": "basis"}]),
        "exits": st.just({"at": [1], "norm": "own", "head_rank": 2, "gate": True}),
    },
)


@given(recipe=recipes, kind=st.sampled_from(KINDS))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_names_and_shapes_of_the_spec_are_those_of_the_model(recipe, kind):
    try:
        blueprint = build_blueprint(read_arch({**CONFIG, **kind}), Recipe.model_validate(recipe)).blueprint
    except RecipeError:
        assume(False)
        raise
    with torch.device("meta"):
        model = RefoldForCausalLM(RefoldConfig(blueprint=blueprint.model_dump(mode="json")))
    stored = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if blueprint.arch.tied_head:
        assert stored.pop("lm_head.weight") == stored["model.embed_tokens.weight"]
    assert stored == {tensor.name: tensor.shape for tensor in target_tensors(blueprint)}
    of_depths = {name for name in stored if name.startswith(("model.depths.", "model.exits."))}
    assert claims(blueprint, OWNED) == dict.fromkeys(of_depths, 1)


def claims(blueprint, kinds) -> dict[str, int]:
    """Counts how many kinds claim each tensor of a depth."""
    places = [(kind, index) for kind in kinds for index in range(blueprint.num_depths)]
    found = [(kind, index, each) for kind, index in places for each in kind.tensors(blueprint, index)]
    assert all(each.kind is kind and each.depth == index and each.part is None for kind, index, each in found)
    return dict(Counter(each.name for *_, each in found))


FULL = {
    "fold": {"loops": 2},
    "relax": {"rank": 2, "vectors": "own", "gain": "own"},
    "factor": {"parameters": 0.8, "share": "basis"},
    "exits": {"norm": "own", "head_rank": 2, "gate": True},
}
PREFIXED = {"fold": {"loops": 2}, "relax": {"type": "prefix", "length": 3}}
RECIPES = (FULL, PREFIXED)


@pytest.mark.parametrize("kind", OWNED, ids=lambda kind: type(kind).__name__)
def test_control_without_one_descriptor_tensors_of_depths_are_not_claimed(kind):
    made = [build_blueprint(read_arch({**CONFIG, **KINDS[0]}), load_recipe(each)).blueprint for each in RECIPES]
    others = [each for each in OWNED if each is not kind]
    assert any(claims(each, OWNED).keys() > claims(each, others).keys() for each in made)


def test_two_window_sizes_in_one_model_are_refused():
    arch = read_arch({**CONFIG, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 3})
    blueprint = build_blueprint(arch, Recipe()).blueprint.model_dump(mode="json")
    blueprint["depths"][1]["window"] = 5
    with pytest.raises(RecipeError, match=r"at most one window size .* \(got \[3, 5\]\)"):
        RefoldConfig(blueprint=blueprint)


def test_a_config_without_a_blueprint_is_refused():
    with pytest.raises(RecipeError, match="`blueprint` is required"):
        RefoldForCausalLM(RefoldConfig())
