"""Models whose linears are stored as factors: the same outputs as dense weights, and the planned size."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from refold.blueprint.schema import Blueprint
from refold.checkpoint.locate import locate
from refold.conversion.convert import ConvertOptions, carry_out, convert
from refold.modeling.load import load_model
from refold.nn.factored import FactoredLinear
from refold.planning.allocation import with_ranks
from refold.planning.factors import stored_linears
from refold.planning.plan import plan, read_plan, replan
from refold.sources.source_model import read_source_model

FACTOR = {"parameters": 0.5, "weight": "none"}
FOLD = {"loops": 2}
RELAX = {"rank": 3, "vectors": "own"}
RECIPES = {
    "factored": {"factor": FACTOR},
    "folded": {"fold": FOLD, "relax": RELAX, "factor": FACTOR},
    "joint": {"fold": FOLD, "relax": {**RELAX, "init": "joint"}, "factor": FACTOR},
    "measured": {
        "fold": FOLD,
        "relax": {"rank": {"split": "measured"}, "init": "joint", "vectors": "own"},
        "factor": {**FACTOR, "split": "measured"},
    },
}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def with_factors(blueprint: Blueprint, share: float) -> Blueprint:
    """Every linear as factors of a share of its smaller side."""
    factors = {}
    for pool, part, name, shape in stored_linears(blueprint):
        factors.setdefault((pool, part), {})[name] = int(share * min(shape))
    return with_ranks(blueprint, {}, factors)


def convert_factored(source, out, recipe, share):
    made, located = plan(source, recipe, allow_larger=True), locate(source)
    made = replan(made, read_source_model(located), with_factors(made.blueprint, share))
    carry_out(made, located, out)
    return out


@pytest.mark.parametrize("variant", ["llama", "llama-mha-bias", "gpt_neox", "gemma2", "olmo2-bias"])
def test_factors_of_full_rank_give_the_source(make_source, load_source, tokens, tmp_path, variant):
    full = convert_factored(make_source(variant), tmp_path / "full", {}, 1)
    half = convert_factored(make_source(variant), tmp_path / "half", {}, 0.5)
    with torch.no_grad():
        theirs = load_source(variant)(tokens).logits
        model = load_model(full, device="cpu")
        assert sum(isinstance(each, FactoredLinear) for each in model.modules()) >= 24
        assert difference(model(tokens).logits, theirs) < 1e-4
        assert difference(load_model(half, device="cpu")(tokens).logits, theirs) > 0.05


@pytest.mark.parametrize("init", ["svd", "joint"])
@pytest.mark.parametrize("variant", ["llama", "llama-mha-bias", "gpt_neox"])
def test_nothing_stored_and_loras_of_full_rank_give_the_source(
    make_source, load_source, tokens, tmp_path, variant, init
):
    recipe = {"fold": FOLD, "relax": {"rank": "full", "vectors": "own", "init": init}}
    folder = convert_factored(make_source(variant), tmp_path / "out", recipe, 0)
    assert not any(name.startswith(("model.mixers", "model.mlps")) for name in load_file(folder / "model.safetensors"))
    with torch.no_grad():
        theirs = load_source(variant)(tokens).logits
        assert difference(load_model(folder, device="cpu")(tokens).logits, theirs) < 1e-4


@pytest.mark.parametrize("name", RECIPES)
def test_factors_are_as_large_as_planned(fold, load, name):
    folder, model = fold("llama-mha-bias", RECIPES[name]), load("llama-mha-bias", RECIPES[name])
    made = read_plan(folder / "plan.json")
    held = load_file(folder / "model.safetensors")
    assert made.cost.target.parameters == sum(each.numel() for each in held.values())
    assert made.cost.target.parameters == sum(each.numel() for each in model.parameters())
    assert made.cost.target.weight_bytes == sum(each.numel() * each.element_size() for each in held.values())
    assert any(part.factors for part in made.blueprint.mixers)


@pytest.mark.parametrize("name", RECIPES)
def test_saved_and_loaded_it_gives_the_same_bits(load, tokens, tmp_path, name):
    model = load("llama-mha-bias", RECIPES[name])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize("name", RECIPES)
def test_cached_steps_are_the_whole_pass(load, tokens, name):
    model = load("llama", RECIPES[name])
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :20], use_cache=True)
        then = model(tokens[:, 20:], past_key_values=first.past_key_values).logits
    assert difference(then, whole[:, 20:]) < 1e-5


def matrices(linear: FactoredLinear) -> tuple[Tensor, Tensor]:
    """Returns A and B of a linear whose rank is not 0."""
    assert linear.a is not None
    assert linear.b is not None
    return linear.a.weight, linear.b.weight


def largest_gradient(weight: Tensor) -> float:
    assert weight.grad is not None
    return float(weight.grad.abs().max())


def test_factors_learn(load, tokens):
    model = load("llama", RECIPES["folded"])
    model.zero_grad()
    model(tokens).logits.square().mean().backward()
    factors = [each for each in model.modules() if isinstance(each, FactoredLinear)]
    assert factors
    assert all(largest_gradient(weight) > 0 for each in factors for weight in matrices(each))
    model.zero_grad()


def test_fresh_factors_vary_as_fresh_matrices_do(make_source, tmp_path):
    recipe = {"weights": "fresh", "factor": {"parameters": 0.6}}
    wide = make_source("llama-mha-bias", hidden_size=64, intermediate_size=160)
    convert(wide, tmp_path / "out", recipe, options=ConvertOptions(allow_larger=True))
    model = load_model(tmp_path / "out", device="cpu")
    std = model.config.read_blueprint().arch.initializer_range
    again = type(model)(model.config)
    for each in (model, again):
        found = [part for part in each.modules() if isinstance(part, FactoredLinear)]
        assert len(found) == 28
        for part in found:
            a, b = matrices(part)
            assert (b @ a).std().item() == pytest.approx(std, rel=0.3)
            assert part.bias is None or not part.bias.any()
