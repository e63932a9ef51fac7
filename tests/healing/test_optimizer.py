import pytest
import torch

from refold.errors import HealError
from refold.healing.groups import Trainable, WeightGroups
from refold.healing.optimizer import freeze, make_optimizers, set_rates
from refold.modeling.load import load_model
from refold.recipe.heal import HealStage


@pytest.fixture
def model(folded):
    return load_model(folded, dtype="float32", device="cpu")


def _made(model, folded, **settings):
    stage = HealStage(tokens=1, **settings)
    trainable = Trainable(stage, WeightGroups(model, folded))
    return make_optimizers(model, stage, trainable), trainable


def _by_name(model, optimizers, key):
    found = {id(p): group[key] for each in optimizers for group in each.param_groups for p in group["params"]}
    return {name: found.get(id(parameter)) for name, parameter in model.named_parameters()}


def test_matrices_decay_and_norms_and_embeddings_do_not(model, folded):
    frozen = "model.mixers.0.q_proj.weight"
    optimizers, _ = _made(model, folded, weight_decay=0.1, freeze=[frozen])
    names = _by_name(model, optimizers, "weight_decay")
    assert names.pop(frozen) is None
    assert names.pop("model.embed_tokens.weight") == 0.0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, value in names.items():
        assert value == (0.1 if model.get_parameter(name).ndim == 2 else 0.0), name
    assert {0.0, 0.1} == set(names.values())


def test_decay_moves_a_weight_without_a_gradient_by_nothing_else(model, folded):
    optimizers, _ = _made(model, folded, weight_decay=0.5, learning_rate=0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_rates(optimizers, 0.1, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(
        model.model.mixers[0].q_proj.weight.detach(), before["model.mixers.0.q_proj.weight"] * 0.95
    )
    assert torch.equal(model.model.norm.weight, before["model.norm.weight"])


def test_rates_are_factors_and_the_last_that_fits_counts(model, folded):
    optimizers, _ = _made(model, folded, rates={"mixers": 0.5, "adapters": 3.0, "model.norm.*": 0.0})
    names = _by_name(model, optimizers, "factor")
    assert names["model.mixers.0.q_proj.weight"] == 0.5
    assert names["model.depths.0.lora.q_proj.a"] == 3.0
    assert names["model.norm.weight"] == 0.0
    assert names["model.mlps.0.up_proj.weight"] == 1.0
    set_rates(optimizers, 2.0, 1.0)
    assert _by_name(model, optimizers, "lr")["model.mixers.0.q_proj.weight"] == 1.0


def test_thawing_weights_have_their_own_rate_and_gradients_only_when_thawed(model, folded):
    optimizers, trainable = _made(model, folded, thaw={"groups": ["mlps"]})
    freeze(model, trainable, is_thawed=False)
    assert not model.model.mlps[0].up_proj.weight.requires_grad
    assert model.model.mixers[0].q_proj.weight.requires_grad
    freeze(model, trainable, is_thawed=True)
    assert model.model.mlps[0].up_proj.weight.requires_grad
    set_rates(optimizers, 1.0, 0.25)
    rates = _by_name(model, optimizers, "lr")
    assert rates["model.mlps.0.up_proj.weight"] == 0.25
    assert rates["model.mixers.0.q_proj.weight"] == 1.0


def test_muon_has_the_matrices_of_the_stack_and_adamw_the_rest(model, folded):
    optimizers, _ = _made(model, folded, optimizer="muon")
    kinds = {id(p): type(each).__name__ for each in optimizers for group in each.param_groups for p in group["params"]}
    names = {name: kinds[id(parameter)] for name, parameter in model.named_parameters()}
    assert names["model.embed_tokens.weight"] == "AdamW"
    assert names["model.norm.weight"] == "AdamW"
    assert names["model.mixers.0.q_proj.weight"] == "Muon"
    assert names["model.depths.0.lora.q_proj.a"] == "Muon"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ["mixer"]}, r"train: a group .* is required \(got 'mixer'\); did you mean 'mixers'"),
        (
            {"train": ["adapters"], "freeze": ["all"]},
            r"train: at least one weight .* \(none left of train: adapters; fr",
        ),
        ({"train": ["adapters"], "thaw": {"groups": ["head"]}}, r"thaw.groups: weights that train are required"),
        ({"train": ["adapters"], "thaw": {"groups": ["all"]}}, r"train: at least one weight to train from the start"),
        ({"rates": {"nothing.*": 1}}, r"rates: a group"),
    ],
)
def test_what_cannot_train_is_refused(model, folded, settings, message):
    with pytest.raises(HealError, match=message):
        Trainable(HealStage(tokens=1, **settings), WeightGroups(model, folded))


def test_groups_follow_the_blueprint(model, folded):
    groups = WeightGroups(model, folded)
    shared = groups.find("shared", "train")
    assert "model.mixers.0.q_proj.weight" in shared
    assert not any(".lora." in name for name in shared)
    assert groups.find("fresh", "train") == frozenset()
    assert groups.find("transferred", "train") == groups.find("all", "train")
    assert all(".lora." in name for name in groups.find("adapters", "train"))
    assert groups.find("model.depths.*.lora.q_proj.?", "train") < groups.find("adapters", "train")


def test_a_source_has_the_groups_that_need_no_blueprint(source):
    groups = WeightGroups(load_model(source, dtype="float32", device="cpu"), source)
    assert groups.find("embeddings", "train") == {"model.embed_tokens.weight"}
    assert all("norm" in name for name in groups.find("vectors", "train"))
    with pytest.raises(HealError, match=r"train: 'mixers' cannot be told for this model \(it has all, vectors"):
        groups.find("mixers", "train")
