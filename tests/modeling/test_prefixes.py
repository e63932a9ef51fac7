"""Prefixes, against attention written out: softmax over the prefix and the tokens that are seen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from refold.blueprint.cost import cost
from refold.errors import ExportError, RefoldError
from refold.exporting.export import export
from refold.modeling.load import load_model
from refold.nn.mixers.memory import CacheStore
from refold.nn.mixers.prefix import put_before

TOLERANCE = 2e-5
FOLD = {"loops": 2, "init": "stepwise"}
PREFIX = {"fold": FOLD, "relax": {"type": "prefix", "length": 3}, "exits": {"at": "loops"}}
STACKS: dict[str, dict[str, Any]] = {
    "tied": PREFIX,
    "own vectors": {**PREFIX, "relax": {"type": "prefix", "length": 3, "vectors": "own"}},
    "some heads read": {**PREFIX, "share_kv": {"from": "first_loop", "heads": [1]}},
}


def far(one: Tensor, other: Tensor) -> float:
    """Largest difference, beside the largest number."""
    return float((one - other).detach().abs().max() / other.detach().abs().max())


@pytest.fixture
def load(load: Callable[..., Any]) -> Callable[..., Any]:
    """Loads a converted model with prefixes as large as normed hidden states, so that they can be seen."""

    def make(*arguments: Any, **fields: Any) -> Any:
        model, generator = load(*arguments, **fields), torch.Generator().manual_seed(5)
        for depth in model.model.depths:
            if depth.prefix is not None:
                depth.prefix.data.normal_(generator=generator)
        return model

    return make


def write_out(plain: Any, prefixed: Any) -> None:
    """Makes the attention of a plain model that of the prefixed one, with nothing of the latter but its prefixes."""
    spec = plain.config.read_blueprint()

    def forward(index: int, query: Tensor, key: Tensor, value: Tensor, context: Any, prefix: Any = None) -> Any:
        depth = plain.model.depths[index]
        mixer = plain.model.mixers[depth.spec.mixer]
        own = prefixed.model.depths[index].prefix
        mixed = torch.zeros_like(query)
        groups = query.shape[1] // key.shape[1]
        for head in range(query.shape[1]):
            rows = slice(head // groups * spec.arch.head_dim, (head // groups + 1) * spec.arch.head_dim)
            own_key, own_value = (own @ each.weight[rows].T for each in (mixer.k_proj, mixer.v_proj))
            for at in range(query.shape[2]):
                first = 0 if depth.spec.window is None else max(0, at + 1 - depth.spec.window)
                for row in range(len(query)):
                    keys = torch.cat((own_key, key[row, head // groups, first : at + 1]))
                    values = torch.cat((own_value, value[row, head // groups, first : at + 1]))
                    weights = (keys @ query[row, head, at] * spec.arch.attention_scale).softmax(0)
                    mixed[row, head, at] = weights @ values
        return mixed.transpose(1, 2), None

    for index, depth in enumerate(plain.model.depths):
        depth.view.forward = lambda *arguments, index=index: forward(index, *arguments)


@pytest.mark.parametrize("variant", ["llama", "mistral-window"])
@torch.no_grad()
def test_every_token_attends_to_the_prefix_and_to_what_it_sees(load, tokens, variant):
    model, plain = load(variant, PREFIX), load(variant, {"fold": FOLD})
    few = tokens[:, :13]
    without = plain(few).logits
    write_out(plain, model)
    assert far(model(few).logits, plain(few).logits) < TOLERANCE
    assert far(model(few).logits, without) > 100 * TOLERANCE


@torch.no_grad()
def test_with_its_prefix_left_out_the_fold_is_left(load, tokens):
    model, plain = load("llama", PREFIX), load("llama", {"fold": FOLD})
    for depth in model.model.depths:
        depth.view.forward = lambda *arguments, view=depth.view: type(view).forward(view, *arguments[:4])
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "gpt_neox"])
@torch.no_grad()
def test_prefill_and_decoding_give_the_full_forward(load, tokens, stack, variant):
    model = load(variant, STACKS[stack])
    expected = model(tokens, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        pieces = [tokens[:, :5], tokens[:, 5:12], *tokens[:, 12:].split(1, dim=1)]
        found = [model(piece, past_key_values=cache).logits for piece in pieces]
        assert far(torch.cat(found, dim=1), expected) < TOLERANCE


@torch.no_grad()
def test_keys_of_a_prefix_are_made_once_for_a_cache(load, tokens):
    model = load("llama", PREFIX)
    made = []
    mixer = model.model.mixers[0]
    plain = mixer.read_prefix
    mixer.read_prefix = lambda *arguments: made.append(1) or plain(*arguments)
    cache = DynamicCache(config=model.config)
    for piece in tokens.split(8, dim=1):
        model(piece, past_key_values=cache)
    assert len(made) == 2
    model(tokens, past_key_values=DynamicCache(config=model.config))
    assert len(made) == 4


@torch.no_grad()
def test_a_cache_holds_the_bytes_its_cost_says(load, tokens):
    model = load("llama", PREFIX)
    cache: Any = DynamicCache(config=model.config)
    model(tokens[:1], past_key_values=cache)
    held = [*(states for layer in cache.layers for states in (layer.keys, layer.values))]
    assert sum(states.nbytes for states in held) + CacheStore(cache).num_made_bytes == cost(
        model.config.read_blueprint(), 4
    ).cache_bytes(24)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", ["llama", "mistral-window"])
@torch.no_grad()
def test_generation_with_padding_beams_and_static_caches(load, tokens, variant, attn):
    model = load(variant, PREFIX, attn=attn)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(tokens, **options)
    alone = model.generate(tokens[:1, 5:], **{**options, "attention_mask": mask[:1, 5:]})
    assert torch.equal(greedy[:1, 24:], alone[:, 19:])
    assert torch.equal(greedy, model.generate(tokens, use_cache=False, **options))
    assert torch.equal(greedy, model.generate(tokens, cache_implementation="static", disable_compile=True, **options))
    beams = model.generate(tokens, num_beams=3, **options)
    assert torch.equal(beams, model.generate(tokens, num_beams=3, use_cache=False, **options))


@pytest.mark.parametrize("variant", ["llama", "mistral-window"])
@torch.no_grad()
def test_each_packed_document_sees_the_prefix_and_no_other_document(load, tokens, variant):
    model = load(variant, PREFIX)
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
def test_attention_weights_are_those_on_tokens(load, tokens):
    model = load("llama", PREFIX, attn="eager")
    attentions = model(tokens, output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(2, 4, 24, 24)] * 4
    on_tokens = attentions[0].sum(-1)
    assert float(on_tokens.min()) < 0.1
    assert float(on_tokens.max()) < 1 + TOLERANCE


@torch.no_grad()
def test_exits_and_drafting_work(load, tokens):
    model = load("llama", PREFIX)
    out = model(tokens, output_exits=True)
    assert torch.equal(out.exit_logits[0], model(tokens, exit_depth=2).logits)
    arguments = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(tokens[:1], **arguments)
    assert torch.equal(model.generate(tokens[:1], assistant_early_exit=2, **arguments), plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(load, tokens, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = load("llama", STACKS["some heads read"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert all(grad is not None and grad.any() for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_is_saved_is_what_comes_back(load, tokens, tmp_path):
    model = load("llama", PREFIX)
    logits = model(tokens).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path, device="cpu")(tokens).logits, logits)


@torch.no_grad()
def test_rows_of_a_fresh_prefix_differ(fold):
    model = load_model(fold("llama", PREFIX), device="cpu")
    prefixes = torch.stack([depth.prefix for depth in model.model.depths]).flatten(0, 1)
    assert 0.01 < float(prefixes.std()) < 0.04
    assert len(prefixes.unique(dim=0)) == 12


def test_other_back_ends_are_refused(fold):
    with pytest.raises(RefoldError, match=r"cannot be loaded .*[Ff]lash"):
        load_model(fold("llama", PREFIX), device="cpu", attn_implementation="flash_attention_2")
    pair = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    with pytest.raises(RefoldError, match=r"attn_implementation: sdpa or eager attention is required by prefixes"):
        put_before(pair, torch.zeros(1, 1, 3, 4), *pair, torch.ones(1, 3), None)


def test_a_stock_model_cannot_be_made_of_it(fold: Callable[..., Path], tmp_path):
    with pytest.raises(ExportError, match=r"this model: attention to tokens alone \(depth 0 has a prefix\)"):
        export(fold("llama", PREFIX), tmp_path / "dense")
