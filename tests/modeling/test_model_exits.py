"""Exits with a norm, a LoRA on the head and a gate of their own."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from refold.blueprint.tensors import target_tensors
from refold.modeling.configuration import RefoldConfig
from refold.modeling.load import load_model
from refold.modeling.model import RefoldForCausalLM
from refold.nn.exits import ExitParts

FOLD = {"fold": {"loops": 2}, "relax": {"rank": 4}}
SHARED = {**FOLD, "exits": {"at": [0, 1]}}
OWN = {**FOLD, "exits": {"at": [0, 1], "norm": "own", "head_rank": 3, "gate": True}}
VARIANTS = ["llama", "llama-mqa-mlp-bias", "gpt_neox"]


@torch.no_grad()
def make_visible(model: Any) -> Any:
    """Gives every part of the exits values that show."""
    generator = torch.Generator().manual_seed(5)
    for weight in model.model.exits.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture
def visible(load):
    return lambda variant="llama", **options: make_visible(load(variant, OWN, **options))


@pytest.mark.parametrize("exits", [{"at": [1]}, {"at": [0, 2], **OWN["exits"]}, {"gate": True}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_of_the_spec_are_those_of_the_model(load, variant, exits):
    model = load(variant, {**FOLD, "exits": exits})
    blueprint = model.config.read_blueprint()
    stored = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if blueprint.arch.tied_head:
        stored.pop("lm_head.weight")
    assert stored == {tensor.name: tensor.shape for tensor in target_tensors(blueprint)}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_converted_exits_begin_as_shared_ones(load, tokens, variant):
    shared, own = load(variant, SHARED), load(variant, OWN)
    one, other = (model(tokens, output_exits=True) for model in (shared, own))
    assert torch.equal(one.logits, other.logits)
    for left, right in zip(one.exit_logits, other.exit_logits, strict=True):
        assert torch.equal(left, right)
    assert one.exit_gates is None
    assert len(other.exit_gates) == 2
    assert all(not gate.any() for gate in other.exit_gates)
    assert torch.equal(own.model.exits["1"].norm.weight, own.model.norm.weight)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_an_exit_leaves_through_its_own_norm_head_and_gate(visible, tokens, variant):
    model = visible(variant)
    blueprint = model.config.read_blueprint()
    out = model(tokens, output_exits=True, output_hidden_states=True)
    for place, index in enumerate((0, 1)):
        parts = model.model.exits[str(index)]
        stream = out.hidden_states[index + 1]
        norm = blueprint.arch.norm
        bias = parts.norm.bias
        normed = (
            F.layer_norm(stream, stream.shape[-1:], parts.norm.weight, bias, norm.eps)
            if norm.kind == "layer"
            else F.rms_norm(stream, stream.shape[-1:], parts.norm.weight, norm.eps)
        )
        pair = parts.lora["lm_head"]
        logits = normed @ (model.lm_head.weight + pair.b @ pair.a).T
        torch.testing.assert_close(out.exit_logits[place], logits, rtol=1e-4, atol=1e-4)
        gate = normed @ parts.gate.weight[0] + parts.gate.bias
        torch.testing.assert_close(out.exit_gates[place], gate, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(out.exit_logits[place], model.project_logits(model.model.norm(stream)), atol=0.1)


@torch.no_grad()
def test_leaving_there_gives_what_the_exit_gives(visible, load, tokens):
    model = visible()
    out = model(tokens, output_exits=True)
    for place, index in enumerate((0, 1)):
        assert torch.equal(model(tokens, exit_depth=index + 1).logits, out.exit_logits[place])
        early = model(tokens, exit_depth=index + 1, output_exits=True)
        assert len(early.exit_logits) == len(early.exit_gates) == place + 1
        assert torch.equal(early.exit_logits[-1], early.logits)
    assert torch.equal(out.logits, load("llama", SHARED)(tokens).logits)
    # Where there is no exit the stack is left through what all share.
    assert torch.equal(model(tokens, exit_depth=3).logits, load("llama", SHARED)(tokens, exit_depth=3).logits)


@torch.no_grad()
def test_only_the_positions_asked_for_are_read_by_heads_and_gates(visible, tokens):
    model = visible()
    full, some = (model(tokens, output_exits=True, logits_to_keep=keep) for keep in (0, 2))
    torch.testing.assert_close(some.exit_logits[1], full.exit_logits[1][:, -2:])
    assert torch.equal(some.exit_gates[1], full.exit_gates[1][:, -2:])


@torch.no_grad()
def test_exits_with_and_without_a_gate_may_stand_in_one_stack(load, tokens):
    blueprint = load("llama", OWN).config.read_blueprint().model_dump(mode="json")
    blueprint["depths"][0]["exit"] = {}
    model = RefoldForCausalLM(RefoldConfig(blueprint=blueprint)).eval()
    gates = model(tokens, output_exits=True).exit_gates
    assert gates[0] is None
    assert gates[1].shape == tokens.shape


def test_new_models_begin_with_neutral_exits(load, tokens):
    model = RefoldForCausalLM(RefoldConfig(blueprint=load("llama", OWN).config.blueprint)).eval()
    parts: Any = model.model.exits["0"]
    assert torch.equal(parts.norm.weight, torch.ones(32))
    assert parts.lora["lm_head"].a.std().item() == pytest.approx(32**-0.5, rel=0.3)
    assert not any(weight.any() for weight in (parts.lora["lm_head"].b, *parts.gate.parameters()))


@pytest.mark.parametrize("variant", ["llama", "llama-mqa-mlp-bias"])
@torch.no_grad()
def test_saved_and_loaded_exits_give_the_same_bits(visible, tokens, tmp_path, variant):
    model = visible(variant)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, device="cpu", attn_implementation="sdpa")
    one, other = (each(tokens, output_exits=True) for each in (model, again))
    for left, right in zip((*one.exit_logits, *one.exit_gates), (*other.exit_logits, *other.exit_gates), strict=True):
        assert torch.equal(left, right)
    tied = again.config.tie_word_embeddings
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_generating_at_an_exit_uses_its_own_parts(visible, tokens):
    model = visible()
    prompt = tokens[:1, :5]
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(prompt, exit_depth=2, **greedy)
    expected = prompt
    with torch.no_grad():
        for _ in range(8):
            best = model(expected, output_exits=True).exit_logits[1][:, -1:].argmax(-1)
            expected = torch.cat((expected, best), dim=1)
    assert torch.equal(found, expected)
    assert not torch.equal(found, model.generate(prompt, **greedy))


def test_drafting_at_an_exit_gives_plain_greedy(visible, tokens):
    model = visible()
    arguments = {"max_new_tokens": 10, "do_sample": False}
    plain = model.generate(tokens[:1], **arguments)
    assert torch.equal(model.generate(tokens[:1], assistant_early_exit=2, **arguments), plain)


def test_checkpointing_and_training_reach_the_exits_alone(load, tokens):
    gradients = []
    for checkpointing in (False, True):
        model = make_visible(load("llama", OWN)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        out = model(tokens, output_exits=True)
        torch.stack([part.square().mean() for part in (*out.exit_logits, *out.exit_gates)]).sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    own = {name for name, _ in model.named_parameters() if name.startswith("model.exits.")}
    assert len(own) == 10
    assert own <= gradients[0].keys()
    assert all(gradients[0][name].any() for name in own)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_gates_pull_at_nothing_but_themselves(visible, tokens):
    model = visible().train()
    torch.stack(model(tokens, output_exits=True).exit_gates).sum().backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert moved == {f"model.exits.{index}.gate.{kind}" for index in (0, 1) for kind in ("weight", "bias")}


def test_a_model_without_parts_of_exits_has_no_modules_for_them(load):
    for recipe in (None, SHARED):
        assert not any(isinstance(module, ExitParts) for module in load("llama", recipe).modules())
