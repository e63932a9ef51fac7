"""Depths that read keys and values of earlier depths, against plain stacks with hooks that pass the same tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from refold.blueprint.cost import cost
from refold.errors import ExportError
from refold.exporting.export import export
from refold.modeling.load import load_model
from refold.nn.mixers.attention import AttentionView

TOLERANCE = 2e-5
FOLD = {"loops": 2, "init": "stepwise"}
TIED = {"fold": FOLD, "exits": {"at": "loops"}}
SHARES: dict[str, dict[str, Any]] = {
    "first loop": {**TIED, "share_kv": {"from": "first_loop"}},
    "pairs": {"share_kv": {"from": "pairs"}},
    "heads": {"share_kv": {"from": {"back": 1}, "heads": [1]}},
    "two sources": {"share_kv": [{"depth": 3, "from": 1, "heads": [0]}, {"depth": 3, "from": 0, "heads": [1]}]},
    "chain": {**TIED, "share_kv": [{"depth": 1, "from": 0}, {"depth": 2, "from": 1}]},
    "relaxed": {
        "fold": {"loops": 2},
        "relax": {"rank": 3, "vectors": "own"},
        "share_kv": {"from": "first_loop"},
    },
    "hybrid": {
        "mixers": [{"type": "gated_deltanet", "depths": [1], "transfer": "all"}],
        "share_kv": [{"depth": 3, "from": 0}],
    },
}


def far(one: Tensor, other: Tensor) -> float:
    """Largest difference, beside the largest number."""
    return float((one - other).detach().abs().max() / other.detach().abs().max())


def without_sharing(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {name: section for name, section in recipe.items() if name != "share_kv"}


def hand_over(plain: Any, shared: Any) -> Callable[[], None]:
    """Hands a plain model's attention the keys and values that the sharing one should read; returns the undoing."""
    depths = shared.config.read_blueprint().depths
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def replace(view: AttentionView, arguments: tuple) -> tuple:
        query, key, value, *rest = arguments
        made[view.layer_idx] = key, value
        key, value = key.clone(), value.clone()
        for read in depths[view.layer_idx].kv:
            for head in read.heads:
                key[:, head], value[:, head] = (states[:, head] for states in made[read.depth])
        return query, key, value, *rest

    views = [module for module in plain.modules() if isinstance(module, AttentionView)]
    hooks = [view.register_forward_pre_hook(replace) for view in views]

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


@pytest.mark.parametrize("share", ["first loop", "pairs", "heads", "two sources", "chain"])
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "gpt_neox-sequential"])
def test_reading_is_what_handing_over_gives_forward_and_backward(load, tokens, share, variant):
    shared, plain = load(variant, SHARES[share]), load(variant, without_sharing(SHARES[share]))
    plain_logits = plain(tokens).logits
    undo = hand_over(plain, shared)
    expected = plain(tokens, labels=tokens)
    found = shared(tokens, labels=tokens)
    assert far(found.logits, expected.logits) < TOLERANCE
    assert far(found.logits, plain_logits) > 100 * TOLERANCE
    expected.loss.backward()
    found.loss.backward()
    undo()
    theirs = dict(plain.named_parameters())
    for name, weight in shared.named_parameters():
        assert weight.grad is not None, name
        torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
    for model in (shared, plain):
        model.zero_grad()


@torch.no_grad()
def test_a_depth_that_sees_what_another_sees_may_read_it(load, tokens):
    """Depth 0 adds nothing to the stream and has depth 1's norm and key weights: then reading changes nothing."""
    plain, shared = load("llama"), load("llama", {"share_kv": [{"depth": 1, "from": 0}]})
    first, second = plain.model.mixers[0], plain.model.mixers[1]
    for name in ("input_norm", "k_proj", "v_proj"):
        getattr(first, name).load_state_dict(getattr(second, name).state_dict())
    for linear in (first.o_proj, plain.model.mlps[0].down_proj):
        linear.weight.zero_()
    weights = {name: weight for name, weight in plain.state_dict().items() if name in shared.state_dict()}
    shared.load_state_dict(weights)
    assert torch.equal(shared(tokens).logits, plain(tokens).logits)
    shared.model.mixers[0].k_proj.weight.mul_(1.1)
    assert far(shared(tokens).logits, plain(tokens).logits) > 100 * TOLERANCE


@torch.no_grad()
def test_which_depth_is_read_matters(load, tokens):
    one, other = (load("llama", {"share_kv": [{"depth": 3, "from": source}]}) for source in (0, 2))
    assert far(one(tokens).logits, other(tokens).logits) > 100 * TOLERANCE


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("variant", ["llama", "mistral-window"])
@torch.no_grad()
def test_prefill_and_decoding_give_the_full_forward(load, tokens, share, variant):
    model = load(variant, SHARES[share])
    expected = model(tokens, use_cache=False).logits
    caches = [DynamicCache(config=model.config)] + ([] if share == "hybrid" else [DynamicCache()])
    for cache in caches:
        pieces = [tokens[:, :5], tokens[:, 5:12], *tokens[:, 12:].split(1, dim=1)]
        found = [model(piece, past_key_values=cache).logits for piece in pieces]
        assert far(torch.cat(found, dim=1), expected) < TOLERANCE


@pytest.mark.parametrize("share", SHARES)
@torch.no_grad()
def test_the_cache_holds_the_bytes_its_cost_says(load, tokens, share):
    model = load("llama", SHARES[share])
    cache = DynamicCache(config=model.config)
    model(tokens[:1], past_key_values=cache)
    held = [
        states for layer in cache.layers for states in (getattr(layer, "keys", None), getattr(layer, "values", None))
    ]
    said = cost(model.config.read_blueprint(), 4)
    assert sum(states.nbytes for states in held if states is not None) == said.cache_bytes(24) - said.state_bytes
    plain = cost(load("llama", without_sharing(SHARES[share])).config.read_blueprint(), 4)
    assert said.cache_bytes(24) < plain.cache_bytes(24)


@pytest.mark.parametrize("share", ["first loop", "heads", "hybrid"])
@torch.no_grad()
def test_generation_with_padding_beams_and_static_caches(load, tokens, share):
    model = load("llama", SHARES[share])
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(tokens, **options)
    assert torch.equal(
        greedy[:1, 24:], model.generate(tokens[:1, 5:], **{**options, "attention_mask": mask[:1, 5:]})[:, 19:]
    )
    assert torch.equal(greedy, model.generate(tokens, use_cache=False, **options))
    assert torch.equal(greedy, model.generate(tokens, cache_implementation="static", disable_compile=True, **options))
    beams = model.generate(tokens, num_beams=3, **options)
    assert torch.equal(beams, model.generate(tokens, num_beams=3, use_cache=False, **options))


@pytest.mark.parametrize("share", ["first loop", "heads", "hybrid"])
@pytest.mark.parametrize("variant", ["llama", "mistral-window"])
@torch.no_grad()
def test_packed_documents_stay_apart(load, tokens, share, variant):
    model = load(variant, SHARES[share])
    lengths = (7, 9, 8)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    alone = torch.cat([model(piece).logits for piece in tokens.split(lengths, dim=1)], dim=1)
    assert far(model(tokens, position_ids=positions).logits, alone) < TOLERANCE
    cache = DynamicCache(config=model.config)
    cuts = (10, 1, 13)
    pieces = zip(tokens.split(cuts, dim=1), positions.split(cuts, dim=1), strict=True)
    found = [model(piece, position_ids=places, past_key_values=cache).logits for piece, places in pieces]
    assert far(torch.cat(found, dim=1), alone) < TOLERANCE


@torch.no_grad()
def test_a_cache_filled_at_an_exit_serves_the_full_depth(load, tokens):
    model = load("llama", SHARES["first loop"])
    cache = DynamicCache(config=model.config)
    left = model(tokens[:, :20], past_key_values=cache, exit_depth=2).logits
    assert torch.equal(left, model(tokens[:, :20], exit_depth=2).logits)
    assert far(model(tokens[:, 20:], past_key_values=cache).logits, model(tokens).logits[:, 20:]) < TOLERANCE
    plain = load("llama", TIED)
    cache = DynamicCache(config=plain.config)
    plain(tokens[:, :20], past_key_values=cache, exit_depth=2)
    # Without sharing the later depths have no keys of those tokens.
    assert [cache.get_seq_length(depth) for depth in range(4)] == [20, 20, 0, 0]


@torch.no_grad()
def test_exits_give_what_leaving_there_gives(load, tokens):
    model = load("llama", SHARES["first loop"])
    out = model(tokens, output_exits=True, output_hidden_states=True)
    assert torch.equal(out.exit_logits[0], model(tokens, exit_depth=2).logits)
    assert torch.equal(out.logits, model(tokens).logits)
    assert [states.shape for states in out.hidden_states] == [(2, 24, 32)] * 5


@torch.no_grad()
def test_early_exit_drafting_gives_plain_greedy(load, tokens):
    model = load("llama", SHARES["first loop"])
    arguments = {"max_new_tokens": 12, "do_sample": False}
    assert not model._is_stateful
    plain = model.generate(tokens[:1], **arguments)
    assert torch.equal(model.generate(tokens[:1], assistant_early_exit=2, **arguments), plain)


@pytest.mark.parametrize("share", ["first loop", "heads", "chain", "relaxed"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(load, tokens, share, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = load("llama-mha-bias", SHARES[share]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert all(grad is not None and grad.isfinite().all() for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", SHARES)
@torch.no_grad()
def test_what_is_saved_is_what_comes_back(load, tokens, share, tmp_path):
    model = load("llama", SHARES[share])
    logits = model(tokens).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path, device="cpu")(tokens).logits, logits)


@torch.no_grad()
def test_eager_attention_agrees_and_writes_its_weights_down(load, tokens):
    for share in ("first loop", "heads"):
        out = load("llama", SHARES[share], attn="eager")(tokens, output_attentions=True)
        assert far(out.logits, load("llama", SHARES[share])(tokens).logits) < TOLERANCE
        assert [weights.shape for weights in out.attentions] == [(2, 4, 24, 24)] * 4


def test_a_stock_model_cannot_be_made_of_it(fold: Callable[..., Path], tmp_path):
    folder = fold("llama", SHARES["pairs"])
    with pytest.raises(ExportError, match=r"keys and values of its own at .* \(depth 1 reads those of depth 0\)"):
        export(folder, tmp_path / "dense")
