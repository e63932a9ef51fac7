"""Folded stacks: ties, LoRAs, dropped parts, exits, caches by depth."""

import pytest
import torch
from transformers import DynamicCache

from refold.blueprint.cost import count_parameters
from refold.blueprint.tensors import target_tensors
from refold.errors import RefoldError
from refold.modeling.configuration import RefoldConfig
from refold.modeling.model import RefoldForCausalLM

TOLERANCE = 2e-5
FULL_RANK = (
    "llama-mha-bias",
    "mistral-window",
    "gpt_neox",
    "gpt_neox-sequential",
    "qwen2-window",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "phi3-window",
)
FULL = {"rank": "full", "vectors": "own"}
LOOPED = {"fold": {"loops": 2}, "relax": {"rank": 4}, "exits": {"at": "loops"}}
STACKS = {
    "strict": {"fold": {"loops": 2}},
    "relaxed": LOOPED,
    "sequence": {"fold": {"loops": 2, "pattern": "sequence"}, "relax": {"rank": 4, "vectors": "own"}},
    "mlps tied": {"fold": {"loops": 2, "tie": ["mlp"]}, "relax": {"rank": {"up_proj": 3}}},
    "first attention dropped": {"drop": {"attention": {"layers": [0]}}},
    "attention dropped": {"drop": {"attention": {"layers": [0, 1, 3]}, "mlp": {"layers": [1, 2]}}},
    "all attention dropped": {"drop": {"attention": {"count": 4}}},
    "pruned": {"drop": {"block": {"layers": [0, 2]}}},
}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("init", ["svd", "joint"])
@pytest.mark.parametrize(
    ("variant", "loops"), [*((variant, 2) for variant in FULL_RANK), *((variant, 4) for variant in FULL_RANK[:4])]
)
@torch.no_grad()
def test_full_rank_with_own_vectors_is_the_source(load, load_source, tokens, variant, init, loops):
    model = load(variant, {"fold": {"loops": loops}, "relax": {**FULL, "init": init}})
    assert len(model.model.mlps) == 4 // loops
    # Three matrices of float32 stand where there was one, so the rounding is another.
    assert difference(model(tokens).logits, load_source(variant)(tokens).logits) < 1e-4


@pytest.mark.parametrize(
    "edit",
    [
        lambda depth: depth.lora["q_proj"].b.mul_(2),
        lambda depth: depth.lora["down_proj"].b.zero_(),
        lambda depth: depth.lora["v_proj"].a.copy_(depth.lora["v_proj"].a.flip(0)),
        lambda depth: depth.vectors["mlp"]()["input_norm.weight"].fill_(1),
    ],
    ids=["scale two", "no LoRA", "factors that do not match", "norms lost"],
)
@torch.no_grad()
def test_full_rank_is_not_the_source_with_one_mistake(load, load_source, tokens, edit):
    model = load("llama-mha-bias", {"fold": {"loops": 2}, "relax": FULL})
    edit(model.model.depths[3])
    assert difference(model(tokens).logits, load_source("llama-mha-bias")(tokens).logits) > 100 * TOLERANCE


@torch.no_grad()
def test_tied_vectors_at_full_rank_are_not_the_source(load, load_source, tokens):
    ours = load("gpt_neox", {"fold": {"loops": 2}, "relax": {"rank": "full"}})(tokens).logits
    assert difference(ours, load_source("gpt_neox")(tokens).logits) > 100 * TOLERANCE


@torch.no_grad()
def test_rank_zero_is_the_strict_model(load, tokens):
    strict = load("gpt_neox", {"fold": {"loops": 2}})
    relaxed = load("gpt_neox", {"fold": {"loops": 2}, "relax": {"rank": 0}})
    assert strict.state_dict().keys() == relaxed.state_dict().keys()
    assert torch.equal(strict(tokens).logits, relaxed(tokens).logits)


@torch.no_grad()
def test_a_zero_start_begins_as_the_strict_model(load, tokens):
    relaxed = load("llama", {"fold": {"loops": 2}, "relax": {"rank": 4, "init": "zero"}})
    assert torch.equal(relaxed(tokens).logits, load("llama", {"fold": {"loops": 2}})(tokens).logits)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "gemma2"])
@torch.no_grad()
def test_prefill_and_decoding_give_the_full_forward(load, tokens, stack, variant):
    model = load(variant, STACKS[stack])
    expected = model(tokens, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        given = [model(tokens[:, :5], past_key_values=cache).logits]
        given += [model(tokens[:, :12][:, 5:], past_key_values=cache).logits]
        given += [model(tokens[:, at : at + 1], past_key_values=cache).logits for at in range(12, 24)]
        assert difference(torch.cat(given, dim=1), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("variant", "stack"),
    [
        ("llama", "first attention dropped"),
        ("llama", "all attention dropped"),
        ("llama", "relaxed"),
        # Beyond their windows, where local and global depths share weights.
        ("gemma2", "relaxed"),
        ("gemma3_text", "strict"),
    ],
)
def test_every_stack_generates(load, tokens, variant, stack):
    model = load(variant, STACKS[stack])
    arguments = {"max_new_tokens": 6, "do_sample": False}
    greedy = model.generate(tokens, **arguments)
    with torch.no_grad():
        for at in range(24, 30):
            assert torch.equal(model(greedy[:, :at]).logits[:, -1].argmax(-1), greedy[:, at])
    if stack != "all attention dropped":
        assert torch.equal(model.generate(tokens, cache_implementation="static", **arguments), greedy)


@pytest.mark.parametrize("stack", STACKS)
def test_every_tensor_is_stored_once(load, stack):
    model = load("llama-mqa-mlp-bias", STACKS[stack])
    blueprint = model.config.read_blueprint()
    named = dict(model.named_parameters())
    assert sum(weight.numel() for weight in named.values()) == count_parameters(blueprint).total
    states = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    assert len({weight.data_ptr() for weight in states.values()}) == len(states)
    assert {name: tuple(weight.shape) for name, weight in states.items()} == {
        tensor.name: tensor.shape for tensor in target_tensors(blueprint)
    }


def test_the_gradient_of_a_tied_part_is_the_sum_over_its_depths(load, tokens):
    tied = load("llama", {"fold": {"loops": 2}}).double()
    untied = RefoldForCausalLM(RefoldConfig(blueprint=_untied(tied.config.blueprint))).double()
    with torch.no_grad():
        for depth in range(4):
            for pool in ("mixers", "mlps"):
                getattr(untied.model, pool)[depth].load_state_dict(getattr(tied.model, pool)[depth % 2].state_dict())
        for name in ("embed_tokens", "norm"):
            getattr(untied.model, name).load_state_dict(getattr(tied.model, name).state_dict())
        untied.lm_head.load_state_dict(tied.lm_head.state_dict())
    losses = [model(tokens, labels=tokens).loss for model in (tied, untied)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    for loss in losses:
        loss.backward()
    for pool in ("mixers", "mlps"):
        for part in range(2):
            for name, weight in getattr(tied.model, pool)[part].named_parameters():
                split = [getattr(untied.model, pool)[depth].get_parameter(name).grad for depth in (part, part + 2)]
                assert split[0] is not None
                assert split[1] is not None
                torch.testing.assert_close(weight.grad, split[0] + split[1], rtol=1e-9, atol=1e-12)


def _untied(blueprint: dict) -> dict:
    parts = {"sources": ()}
    depths = [{**depth, "mixer": at, "mlp": at} for at, depth in enumerate(blueprint["depths"])]
    return {**blueprint, "mixers": [parts] * 4, "mlps": [parts] * 4, "depths": depths}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(load, tokens, reentrant):
    positions = torch.cat((torch.arange(10), torch.arange(14))).expand(2, -1)
    gradients = []
    for checkpointing in (False, True):
        model = load("gpt_neox", {"fold": {"loops": 2}, "relax": {"rank": 4, "vectors": "own"}}).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(tokens, labels=tokens, position_ids=positions).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert all(grad is not None for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_exits_give_what_leaving_there_gives(load, tokens):
    model = load("llama", LOOPED)
    out = model(tokens, output_exits=True)
    assert out.exit_logits is not None
    assert len(out.exit_logits) == 1
    left = model(tokens, exit_depth=2)
    assert torch.equal(out.exit_logits[0], left.logits)
    assert torch.equal(model(tokens, exit_depth=4).logits, out.logits)
    assert difference(left.logits, out.logits) > 0.01
    assert model(tokens).exit_logits is None
    with pytest.raises(RefoldError, match=r"exit_depth: must lie in 1\.\.4 \(got 5\)"):
        model(tokens, exit_depth=5)


def test_early_exit_drafting_gives_plain_greedy(load, tokens):
    model = load("llama", LOOPED)
    arguments = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(tokens[:1], **arguments)
    assert torch.equal(model.generate(tokens[:1], assistant_early_exit=2, **arguments), plain)
    assert model.config.num_hidden_layers == 4


@torch.no_grad()
def test_only_the_logits_asked_for_are_computed(load, tokens):
    model = load("llama")
    full = model(tokens).logits
    assert difference(model(tokens, logits_to_keep=2).logits, full[:, -2:]) < TOLERANCE
    assert difference(model(tokens, logits_to_keep=torch.tensor([3, 5])).logits, full[:, [3, 5]]) < TOLERANCE


@torch.no_grad()
def test_embeddings_may_be_given_instead_of_tokens(load, tokens):
    model = load("llama")
    embedded = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
    assert torch.equal(embedded, model(tokens).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(tokens, inputs_embeds=model.get_input_embeddings()(tokens))


def test_vocabularies_can_grow_and_heads_stay_tied(load, tokens):
    model = load("llama-llama3")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(100)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model(tokens).logits.shape == (2, 24, 100)
