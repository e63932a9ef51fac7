"""Models whose tied linears share a basis: the same outputs as dense weights, and the planned size."""

import pytest
import torch
from safetensors.torch import load_file

from refold.blueprint.cost import cost
from refold.blueprint.schema import Pool
from refold.checkpoint.locate import locate
from refold.conversion.convert import ConvertOptions, carry_out, convert
from refold.modeling.load import load_model
from refold.nn.factored import BasisLinear
from refold.planning.allocation import with_ranks
from refold.planning.build import identity_blueprint
from refold.planning.factors import linear_budget
from refold.planning.plan import plan, read_plan, replan
from refold.sources.source_model import read_source_model

FACTOR = {"parameters": 0.6, "weight": "none", "share": "basis"}
RECIPES = {
    "cycle": {"fold": {"loops": 2}, "factor": FACTOR},
    "neighbours": {"fold": {"loops": 2, "pattern": "sequence"}, "factor": FACTOR},
    "ends": {"fold": {"loops": 2, "prelude": 1, "coda": 1}, "factor": FACTOR},
    "relaxed": {"fold": {"loops": 2}, "relax": {"rank": 3, "init": "joint"}, "factor": FACTOR},
    "mlps-alone": {"fold": {"loops": 4, "tie": ["mlp"]}, "factor": FACTOR},
}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def bases(model: torch.nn.Module) -> list[BasisLinear]:
    return [each for each in model.modules() if isinstance(each, BasisLinear)]


@pytest.mark.parametrize("loops", [2, 4])
@pytest.mark.parametrize("variant", ["llama", "llama-mha-bias", "gpt_neox", "gemma2", "olmo2-bias"])
def test_bases_of_full_rank_give_the_source(fold, load, load_source, tokens, variant, loops):
    recipe = {"fold": {"loops": loops}, "factor": {**FACTOR, "parameters": 3}}
    half = {"fold": {"loops": loops}, "factor": {**FACTOR, "parameters": 0.5}}
    with torch.no_grad():
        theirs, model = load_source(variant)(tokens).logits, load(variant, recipe)
        assert len(bases(model)) >= 4
        assert difference(model(tokens).logits, theirs) < 1e-4
        assert difference(load(variant, half)(tokens).logits, theirs) > 0.05


def test_control_with_coefficients_of_another_depth_it_is_another_model(make_source, load_source, tokens, tmp_path):
    convert(
        make_source("llama"),
        tmp_path / "out",
        {**RECIPES["cycle"], "factor": {**FACTOR, "parameters": 3}},
        options=ConvertOptions(allow_larger=True),
    )
    model = load_model(tmp_path / "out", device="cpu")
    with torch.no_grad():
        theirs = load_source("llama")(tokens).logits
        assert difference(model(tokens).logits, theirs) < 1e-4
        one, other = (model.model.depths[depth].coefficients["o_proj"] for depth in (0, 2))
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
        assert difference(model(tokens).logits, theirs) > 0.05


@pytest.mark.parametrize("name", RECIPES)
def test_bases_are_as_large_as_planned(fold, load, name):
    folder, model = fold("llama-mha-bias", RECIPES[name]), load("llama-mha-bias", RECIPES[name])
    made = read_plan(folder / "plan.json")
    held = load_file(folder / "model.safetensors")
    assert made.cost.target.parameters == sum(each.numel() for each in held.values())
    assert made.cost.target.parameters == sum(each.numel() for each in model.parameters())
    assert made.cost.target.weight_bytes == sum(each.numel() * each.element_size() for each in held.values())
    linears = sum(
        each.numel()
        for tensor, each in held.items()
        if each.ndim == 2 and not tensor.startswith(("model.embed_tokens", "lm_head"))
    )
    budget = linear_budget(identity_blueprint(made.blueprint.arch), 0.6)
    assert 0.9 * budget < linears <= budget
    told = {line.tensors: line.reason for line in made.lines}
    tied = "mlps.*.up_proj" if name == "mlps-alone" else "mixers.*.q_proj"
    assert told[f"model.{tied}.a.*"].startswith(("basis and coefficients fitted together", "truncated SVD"))
    assert told[f"model.depths.*.coefficients.{tied[-6 if 'q_proj' in tied else -7 :]}"].startswith("basis and")


@pytest.mark.parametrize("name", RECIPES)
def test_flops_are_those_of_every_product_that_is_made(load, tokens, name):
    model = load("llama", RECIPES[name])
    counted = count_products(model, tokens)
    blueprint = model.config.read_blueprint()
    arch = blueprint.arch
    head = 2 * arch.vocab_size * arch.hidden_size
    assert cost(blueprint, 4).flops_per_token == counted + head


def count_products(model, tokens: torch.Tensor) -> int:
    """FLOPs per token of `nn.functional.linear` in the stack."""
    found = 0
    plain = torch.nn.functional.linear

    def counting(x, weight, bias=None):
        nonlocal found
        found += 2 * weight.numel()
        return plain(x, weight, bias)

    torch.nn.functional.linear = counting
    try:
        with torch.no_grad():
            model.model(tokens)
    finally:
        torch.nn.functional.linear = plain
    return found


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


def test_the_depths_of_a_basis_all_teach_it(load, tokens):
    model = load("llama", RECIPES["cycle"])
    a = model.model.mixers[0].get_parameter("q_proj.a.weight")
    coefficients = [model.model.depths[depth].coefficients["q_proj"] for depth in (0, 2)]
    plain = gradients(model, tokens, a)
    assert all(each.grad.abs().max() > 0 for each in coefficients)
    parts = []
    for depth in (0, 2):
        with pytest.MonkeyPatch.context() as patch:
            silence(patch, model, depth)
            parts.append(gradients(model, tokens, a))
    assert all(part.abs().max() > 0 for part in parts)
    assert torch.allclose(plain, parts[0] + parts[1], rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


def silence(patch: pytest.MonkeyPatch, model, depth: int) -> None:
    """Lets no gradient of one depth's use of the basis of queries reach it."""
    linear = model.model.mixers[0].q_proj
    own = model.model.depths[depth].coefficients["q_proj"]

    def forward(x, coefficients):
        a = linear.a.weight.detach() if coefficients is own else linear.a.weight
        return torch.nn.functional.linear(torch.nn.functional.linear(x, a), coefficients)

    patch.setattr(linear, "forward", forward)


def gradients(model, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    model(tokens).logits.square().mean().backward()
    assert weight.grad is not None
    return weight.grad.clone()


@pytest.mark.parametrize("name", ["cycle", "relaxed"])
def test_recomputed_activations_give_the_same_gradients(fold, tokens, name):
    found = []
    for recompute in (False, True):
        model = load_model(fold("llama", RECIPES[name]), device="cpu").train()
        if recompute:
            model.gradient_checkpointing_enable()
        model(tokens).logits.square().mean().backward()
        found.append({weight: each.grad for weight, each in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][each], found[1][each], rtol=1e-4, atol=1e-5) for each in found[0])
    assert all(each.abs().max() > 0 for weight, each in found[0].items() if "coefficients" in weight)


def test_bases_of_any_rank_fit_any_fold(make_source, load_source, tokens, tmp_path):
    source = make_source("llama")
    made, located = plan(source, {"fold": {"loops": 2}, "relax": {"rank": 0, "vectors": "own"}}), locate(source)
    ranks: dict[tuple[Pool, int], dict[str, int]] = {
        ("mixer", 0): {"q_proj": 32, "o_proj": 32},
        ("mlp", 1): {"up_proj": 32},
    }
    blueprint = with_ranks(made.blueprint, {}, {}, ranks)
    carry_out(replan(made, read_source_model(located), blueprint), located, tmp_path / "out")
    model = load_model(tmp_path / "out", device="cpu")
    with torch.no_grad():
        names = load_source("llama").state_dict()
        depth, part = model.model.depths[2], model.model.mixers[0]
        found = depth.coefficients["o_proj"] @ part.get_parameter("o_proj.a.weight")
        assert torch.allclose(found, names["model.layers.2.self_attn.o_proj.weight"], atol=1e-5)
        assert model(tokens).logits.isfinite().all()


def test_fresh_bases_vary_as_fresh_matrices_do(make_source, tmp_path):
    recipe = {"weights": "fresh", **RECIPES["cycle"]}
    wide = make_source("llama-mha-bias", hidden_size=64, intermediate_size=160)
    convert(wide, tmp_path / "out", recipe, options=ConvertOptions(allow_larger=True))
    model = load_model(tmp_path / "out", device="cpu")
    std = model.config.read_blueprint().arch.initializer_range
    for each in (model, type(model)(model.config)):
        assert len(bases(each)) == 14
        for depth in (0, 2):
            for name, linear in each.model.mixers[0].named_modules():
                if isinstance(linear, BasisLinear):
                    product = each.model.depths[depth].coefficients[name] @ linear.a.weight
                    assert product.std().item() == pytest.approx(std, rel=0.3)
