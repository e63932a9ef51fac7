"""Mixers with states inside a model: caches, padding, documents, beams, and the sizes of their specs."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.generation import stopping_criteria

from refold.blueprint.cost import cost
from refold.errors import RefoldError
from refold.mixers.registry import MIXERS
from refold.modeling.configuration import RefoldConfig
from refold.modeling.load import load_model
from refold.modeling.model import RefoldForCausalLM
from refold.modeling.recurrent_cache import new_cache

OPTIONS: dict[str, dict[str, Any]] = {
    "retention": {"type": "retention", "transfer": "all"},
    "lightning": {"type": "retention", "decay": "slopes", "activation": "silu", "norm": "full", "gate": "sigmoid"},
    "mamba": {"type": "mamba", "transfer": ["mlp"]},
    "mamba2": {"type": "mamba2", "transfer": "all"},
    "mamba2-groups": {"type": "mamba2", "q_heads": 2, "k_heads": 2, "key_dim": 6},
    "gla": {"type": "gla", "transfer": "all"},
    "liger": {"type": "gla", "decay_from": "keys", "activation": "softmax", "norm": "none", "gate": "none"},
    "gated_deltanet": {"type": "gated_deltanet", "transfer": "all"},
    "deltanet": {"type": "gated_deltanet", "decay": False, "conv": 0, "gate": "none", "k_heads": 2},
    "hedgehog": {"type": "linear_attention"},
    "hedgehog-window": {"type": "linear_attention", "window": 5},
    "favor": {"type": "linear_attention", "feature_map": "favor", "features": 12},
    "dijiang": {"type": "linear_attention", "feature_map": "dijiang"},
    "t2r-plain": {"type": "linear_attention", "feature_map": "t2r", "normalise": False},
    "elu": {"type": "linear_attention", "feature_map": "elu"},
    "relu": {"type": "linear_attention", "feature_map": "relu"},
}
FOLDED = {"fold": {"loops": 2}, "relax": {"rank": 3, "init": "svd", "vectors": "own"}}
TOLERANCE = 2e-5


def recipe(name: str, **sections: Any) -> dict[str, Any]:
    return {"mixers": [OPTIONS[name]], **sections}


def far(one: Tensor, other: Tensor) -> float:
    """Largest difference, beside the largest number."""
    return float((one - other).detach().abs().max() / other.detach().abs().max())


def test_every_mixer_with_a_state_is_tried():
    assert {options["type"] for options in OPTIONS.values()} == {
        name for name, spec in MIXERS.items() if spec.is_recurrent
    }


@pytest.mark.parametrize("sections", [{}, FOLDED], ids=["stored", "own"])
@pytest.mark.parametrize(("name", "vector"), [("mamba", "dt_proj.bias"), ("mamba2", "dt_bias")])
def test_step_sizes_of_a_model_made_from_a_config_are_drawn_between_their_bounds(fold, name, vector, sections):
    folder = fold("llama", recipe(name, **sections))
    made = RefoldForCausalLM(RefoldConfig.from_pretrained(folder))
    found = [weight.detach() for key, weight in made.named_parameters() if key.endswith(vector)]
    assert len(found) == 4
    for weight in found:
        steps = torch.nn.functional.softplus(weight)
        assert float(steps.min()) > 0.0009
        assert float(steps.max()) < 0.11
        assert len(steps.unique()) > 1
    # Loading fills nothing anew.
    loaded = load_model(folder).state_dict()
    written = load_file(folder / "model.safetensors")
    assert all(torch.equal(loaded[key], weight) for key, weight in written.items() if key.endswith(vector))


@pytest.fixture
def load(load: Callable[..., Any]) -> Callable[..., Any]:
    """Loads a converted model whose mixers' fresh weights are as large as the source's, so that they can be seen."""

    def make(*arguments: Any, **fields: Any) -> Any:
        model, generator = load(*arguments, **fields), torch.Generator().manual_seed(5)
        for key, weight in model.model.mixers.named_parameters():
            is_small = "_proj" in key and key.endswith(".weight") and float(weight.detach().std()) < 0.1
            if key.endswith("conv1d.weight") or is_small:
                weight.data.normal_(std=0.3, generator=generator)
        return model

    return make


@pytest.fixture(params=OPTIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("variant", ["llama", "gpt_neox"])
def test_calls_with_a_cache_give_what_one_call_gives(load, tokens, name, variant):
    # In float64 with float32 states: without a decay nothing damps what float32 products round off.
    model = load(variant, recipe(name)).double()
    whole = model(tokens).logits
    cache = DynamicCache(config=model.config)
    pieces = [tokens[:, :9], tokens[:, 9:11], *tokens[:, 11:].split(1, dim=1)]
    found = torch.cat([model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces], dim=1)
    assert far(found, whole) < TOLERANCE


@pytest.mark.parametrize("cuts", [(11, 13), (10, 1, 13), (11, 1, 12), (5, 5, 14), (4, 8, 12)], ids=str)
@pytest.mark.parametrize("kept", [[], [1]], ids=["recurrent", "hybrid"])
@torch.no_grad()
def test_left_padding_may_end_anywhere_in_a_prompt_read_in_pieces(load, tokens, kept, cuts):
    # In float64: without padding two ways through the delta rule differ by up to 3.3e-5 in float32.
    model = load("llama", {"mixers": [{**OPTIONS["gated_deltanet"], "except": kept}]}).double()
    mask = torch.ones_like(tokens)
    mask[0, :11] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, found, read = DynamicCache(config=model.config), [], 0
    for piece, places in zip(tokens.split(cuts, dim=1), position_ids.split(cuts, dim=1), strict=True):
        read += piece.shape[1]
        options = {"attention_mask": mask[:, :read], "position_ids": places, "past_key_values": cache}
        found.append(model(piece, use_cache=True, **options).logits)
    found = torch.cat(found, dim=1)
    assert far(found[0, 11:], model(tokens[:1, 11:]).logits[0]) < TOLERANCE
    assert far(found[1], model(tokens[1:]).logits[0]) < TOLERANCE


def test_hybrids_count_tokens_by_their_attention(load, tokens, name):
    model = load("mistral-window", {"mixers": [{**OPTIONS[name], "except": [1, 3]}]})
    cache = DynamicCache(config=model.config)
    found = [model(piece, past_key_values=cache, use_cache=True).logits for piece in tokens.split([13, 1, 10], dim=1)]
    assert far(torch.cat(found, dim=1), model(tokens).logits) < TOLERANCE


def test_left_padding_is_not_seen(load, tokens, name):
    model = load("llama", recipe(name))
    padded = torch.cat((torch.full((2, 6), 5), tokens), dim=1)
    mask = torch.ones_like(padded)
    mask[0, :6], mask[1, :2] = 0, 0
    padded[1, 2:] = torch.cat((tokens[1, :4], tokens[1]))
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=position_ids).logits
    assert far(found[0, 6:], model(tokens[:1]).logits[0]) < TOLERANCE
    assert far(found[1, 2:], model(padded[1:, 2:]).logits[0]) < TOLERANCE


def test_packed_documents_do_not_see_each_other(load, tokens, name):
    model = load("llama", recipe(name))
    lengths = (7, 1, 16)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    found = model(tokens[:1], position_ids=position_ids).logits
    alone = torch.cat([model(piece).logits for piece in tokens[:1].split(lengths, dim=1)], dim=1)
    assert far(found, alone) < TOLERANCE
    assert far(found, model(tokens[:1]).logits) > 100 * TOLERANCE
    # With a cache, cut before, at and behind where documents begin.
    for cuts in ((10, 1, 13), (5, 3, 2, 14), (7, 1, 1, 1, 14)):
        cache = DynamicCache(config=model.config)
        pieces = zip(tokens[:1].split(cuts, dim=1), position_ids.split(cuts, dim=1), strict=True)
        cut = [model(ids, position_ids=places, past_key_values=cache).logits for ids, places in pieces]
        assert far(torch.cat(cut, dim=1), alone) < TOLERANCE


def test_beams_with_a_cache_find_what_they_find_without(load, tokens, name):
    model = load("llama", recipe(name))
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with_cache = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(with_cache, model.generate(tokens, attention_mask=mask, use_cache=False, **options))


def test_the_state_has_the_size_its_spec_says_at_any_length(load, tokens, name):
    model = load("llama", recipe(name))
    sizes = set()
    for length in (3, 24):
        cache = DynamicCache(config=model.config)
        model(tokens[:1, :length], past_key_values=cache, use_cache=True)
        sizes.add(
            sum(
                state.nbytes
                for layer in cache.layers
                if isinstance(layer, LinearAttentionCacheLayerMixin)
                for states in (layer.recurrent_states, layer.conv_states)
                for state in states.values()
                if state is not None and state.shape[-2:] != (1, 1)
            )
        )
    assert sizes == {cost(model.config.read_blueprint(), 4).state_bytes}
    # What counts tokens where no depth attends holds one place.
    assert cache.get_seq_length() == 24
    first = cache.layers[0]
    assert isinstance(first, CacheLayerMixin)
    assert first.keys is not None
    assert first.keys.numel() == 1


def test_states_start_anew_after_a_reset(load, tokens, name):
    model = load("llama", recipe(name))
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache, use_cache=True)
    cache.reset()
    found = [model(piece, past_key_values=cache, use_cache=True).logits for piece in tokens.split([11, 13], dim=1)]
    assert far(torch.cat(found, dim=1), model(tokens).logits) < TOLERANCE


def test_mixers_work_inside_a_folded_and_relaxed_model(load, fold, tokens, name, tmp_path):
    sections = recipe(name, **FOLDED)
    model = load("llama", sections)
    blueprint = model.config.read_blueprint()
    assert len(blueprint.mixers) == 2
    cache = DynamicCache(config=model.config)
    found = [model(piece, past_key_values=cache, use_cache=True).logits for piece in tokens.split([20, 1, 3], dim=1)]
    whole = model(tokens).logits
    assert far(torch.cat(found, dim=1), whole) < TOLERANCE
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again", device="cpu")(tokens).logits, whole)


def test_gradients_reach_every_weight(load, tokens, name):
    model = load("gpt_neox", recipe(name, **FOLDED))
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    without = [
        key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.isfinite().all()
    ]
    assert not without
    silent = {key for key, weight in model.named_parameters() if not weight.grad.any()}
    # LoRAs of fresh linears have a zero B, behind which A learns nothing yet.
    assert all(".lora." in key and key.endswith(".a") for key in silent), silent
    model.zero_grad()


def test_a_cache_of_keys_and_values_is_refused(load, tokens):
    model = load("llama", recipe("retention"))
    with pytest.raises(RefoldError, match=r"cache: a cache made for this model's config is required"):
        model(tokens, past_key_values=DynamicCache(), use_cache=True)


def test_masks_that_are_not_padding_are_refused(load, tokens):
    model = load("llama", recipe("retention"))
    with pytest.raises(RefoldError, match=r"attention_mask: \[batch, tokens\] is required .*got 4 dimensions"):
        model(tokens, attention_mask=torch.zeros(2, 1, 24, 24))


def test_stateful_models_say_so(load):
    assert load("llama", recipe("gla"))._is_stateful
    assert not load("llama", {})._is_stateful


@pytest.mark.parametrize("kept", [[], [1]])
def test_static_caches_serve_too(load, tokens, kept):
    model = load("llama", {"mixers": [{**OPTIONS["gated_deltanet"], "except": kept}]})
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    static = model.generate(tokens, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, model.generate(tokens, **options))


def test_drafted_tokens_are_refused_because_states_cannot_go_back(load, tokens):
    model = load("llama", recipe("retention"))
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(tokens[:1], assistant_model=model, max_new_tokens=3, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("kept", [[], [0, 2]], ids=["recurrent", "hybrid"])
def test_a_cache_with_states_refuses_to_be_cropped_and_stays_whole(load, tokens, kept):
    model = load("llama", {"mixers": [{**OPTIONS["gated_deltanet"], "except": kept}]})
    cache = new_cache(model.config)
    model(tokens[:, :12], past_key_values=cache, use_cache=True)
    with pytest.raises(RefoldError, match=r"crop: .*\(got recurrent states.*; read the shorter text anew, or .*copy"):
        cache.crop(-3)
    found = model(tokens[:, 12:], past_key_values=cache, use_cache=True).logits
    assert far(found, model(tokens).logits[:, 12:]) < TOLERANCE


@torch.no_grad()
def test_a_copy_of_a_cache_goes_back_to_where_it_was_made(load, tokens):
    # In float64: two ways through the delta rule differ by up to 3.3e-5 in float32.
    model = load("llama", {"mixers": [{**OPTIONS["gated_deltanet"], "except": [1]}]}).double()
    cache = new_cache(model.config)
    model(tokens[:, :12], past_key_values=cache, use_cache=True)
    kept = copy.deepcopy(pickle.loads(pickle.dumps(cache)))
    model(tokens[:, :7], past_key_values=cache, use_cache=True)
    with pytest.raises(RefoldError, match="crop"):
        kept.crop(-1)
    found = model(tokens[:, 12:], past_key_values=kept, use_cache=True).logits
    assert far(found, model(tokens).logits[:, 12:]) < TOLERANCE


@torch.no_grad()
def test_a_users_cache_is_left_as_it_was_made(load, tokens):
    for recipe_ in (
        {"mixers": [{**OPTIONS["gated_deltanet"], "except": [1]}]},
        {"relax": {"type": "prefix", "length": 2}, "fold": {"loops": 2}},
    ):
        model = load("llama", recipe_)
        cache = DynamicCache(config=model.config)
        before = set(vars(cache))
        model(tokens[:, :12], past_key_values=cache, use_cache=True)
        assert set(vars(cache)) == before


@torch.no_grad()
def test_generation_hands_out_a_cache_that_refuses_to_be_cropped(load, tokens):
    model = load("llama", {"mixers": [{**OPTIONS["gated_deltanet"], "except": [0]}]})
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    left = model.generate(tokens, **options)
    cache = left[next(name for name in ("cache", "past_key_values") if name in left)]
    length = cache.get_seq_length()
    cache.crop(0)
    with pytest.raises(RefoldError, match="crop"):
        cache.crop(-1)
    assert cache.get_seq_length() == length


def test_a_cache_of_attention_alone_is_cropped(load, tokens):
    model = load("llama", {})
    cache = DynamicCache(config=model.config)
    model(tokens[:, :12], past_key_values=cache, use_cache=True)
    cache.crop(-4)
    found = model(tokens[:, 8:], past_key_values=cache, use_cache=True).logits
    assert far(found, model(tokens).logits[:, 8:]) < TOLERANCE


@pytest.mark.parametrize(("kept", "reminded"), [([], False), ([1], True)], ids=["recurrent", "hybrid"])
def test_the_sources_context_is_no_limit_where_only_states_are_kept(load, tokens, monkeypatch, kept, reminded):
    model = load("llama", {"mixers": [{**OPTIONS["gated_deltanet"], "except": kept}]})
    monkeypatch.setattr(model.config, "max_position_embeddings", tokens.shape[1] - 4)
    said: list[str] = []
    # It is said once in a process, so the logger is asked, not the log.
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", said.append)
    model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert any("predefined maximum length" in line for line in said) == reminded
