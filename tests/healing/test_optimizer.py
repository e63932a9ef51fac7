import torch

from refold.blueprint.recipe import HealStage
from refold.healing.optimizer import make_optimizer
from refold.modeling.load import load_model


def test_matrices_decay_and_norms_and_embeddings_do_not(folded):
    model = load_model(folded, dtype="float32", device="cpu")
    model.model.mixers[0].q_proj.weight.requires_grad_(False)
    optimizer = make_optimizer(model, HealStage(tokens=1, weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decay.get(id(parameter)) for name, parameter in model.named_parameters()}
    assert names.pop("model.mixers.0.q_proj.weight") is None
    assert names.pop("model.embed_tokens.weight") == 0.0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, value in names.items():
        parameter = model.get_parameter(name)
        assert value == (0.1 if parameter.ndim == 2 else 0.0), name
    assert {0.0, 0.1} == set(names.values())


def test_decay_moves_what_gets_no_gradient_nowhere_else():
    linear = torch.nn.Linear(3, 3)
    optimizer = make_optimizer(linear, HealStage(tokens=1, weight_decay=0.5, learning_rate=0.1))
    before = {name: value.detach().clone() for name, value in linear.named_parameters()}
    for parameter in linear.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(linear.weight.detach(), before["weight"] * 0.95)
    assert torch.equal(linear.bias, before["bias"])
