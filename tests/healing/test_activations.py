"""Observed values of a pass, against the outputs of transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
)

from refold.conversion.convert import ConvertOptions, convert
from refold.errors import HealError
from refold.healing.activations import Want, observe, source_layers
from refold.modeling.load import load_model

EVERYTHING: frozenset[Want] = frozenset({"predictions", "streams", "mixers", "attentions"})
VARIANTS = ["llama", "gpt_neox", "gpt_neox-sequential", "mistral-window"]
TOKENS = torch.randint(2, 95, (2, 12), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.cat((torch.arange(7), torch.arange(5))).expand(2, -1)


def load(folder: Path, attn: str = "eager") -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation=attn)
    return model.eval()


@pytest.fixture
def fold(make_source: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def make(variant: str = "llama", recipe=None) -> Path:
        convert(make_source(variant), tmp_path / "model", recipe, options=ConvertOptions(allow_larger=True))
        return tmp_path / "model"

    return make


@pytest.mark.parametrize("variant", [*VARIANTS, "gemma2", "gemma3_text", "olmo2", "phi3"])
@torch.no_grad()
def test_a_source_gives_what_transformers_returns(make_source, variant):
    model = load(make_source(variant))
    found = observe(model, TOKENS, POSITIONS, EVERYTHING)
    # With a cache transformers would let the second document look at the first.
    options = {"use_cache": False, "output_hidden_states": True, "output_attentions": True}
    reference = model(TOKENS, position_ids=POSITIONS, **options)
    assert len(found.streams) == len(reference.hidden_states) == 5
    for stream, hidden in zip(found.streams[:-1], reference.hidden_states[:-1], strict=True):
        torch.testing.assert_close(stream, hidden, rtol=0, atol=0)
    norm = model.base_model.norm if hasattr(model.base_model, "norm") else model.base_model.final_layer_norm
    torch.testing.assert_close(norm(found.streams[-1]), reference.hidden_states[-1], rtol=0, atol=0)
    torch.testing.assert_close(found.predictions.head.logits(found.predictions.hidden), reference.logits)
    assert list(found.mixers) == list(found.attentions) == found.source_layers == [0, 1, 2, 3]
    for layer, weights in found.attentions.items():
        torch.testing.assert_close(weights, reference.attentions[layer], rtol=0, atol=0)
        # No token of the second document looks at the first.
        assert not weights[:, :, 7:, :7].any()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_mixers_are_what_is_missing_without_them(make_source, variant):
    model = load(make_source(variant))
    found = observe(model, TOKENS, POSITIONS, EVERYTHING)
    block = model.base_model.layers[2]
    attention = block.attention if hasattr(block, "attention") else block.self_attn
    projection = attention.dense if hasattr(attention, "dense") else attention.o_proj
    before = found.streams[2]
    if variant != "gpt_neox":  # there the MLP reads the same stream, so the difference is the mixer's output alone
        mlp = block.mlp(block.post_attention_layernorm(before + found.mixers[2]))
        torch.testing.assert_close(found.streams[3], before + found.mixers[2] + mlp)
    for weight in projection.parameters():
        weight.zero_()
    without = observe(model, TOKENS, POSITIONS, frozenset[Want]({"streams"})).streams[3]
    if variant == "gpt_neox":
        torch.testing.assert_close(found.streams[3] - without, found.mixers[2])
    assert not torch.allclose(found.streams[3], without)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_folded_model_gives_what_its_source_gives(make_source, fold, variant):
    found = observe(load_model(fold(variant), device="cpu", dtype=torch.float64, attn_implementation="eager"),
                    TOKENS, POSITIONS, EVERYTHING)  # fmt: skip
    reference = observe(load(make_source(variant)), TOKENS, POSITIONS, EVERYTHING)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.streams, reference.streams, **close)
    torch.testing.assert_close(found.mixers, reference.mixers, **close)
    torch.testing.assert_close(found.attentions, reference.attentions, **close)


@torch.no_grad()
def test_a_part_that_runs_twice_is_seen_at_each_depth(fold):
    recipe = {"fold": {"loops": 2}, "drop": {"attention": {"layers": [1]}}}
    model = load_model(fold(recipe=recipe), device="cpu", dtype=torch.float64, attn_implementation="eager")
    found = observe(model, TOKENS, POSITIONS, EVERYTHING)
    assert list(found.mixers) == list(found.attentions) == [0, 2, 3]
    assert source_layers(model) == found.source_layers == [0, 1, 2, 3]
    batch = model.model.batch(found.streams[0], position_ids=POSITIONS)
    for depth, update in found.mixers.items():
        alone = model.model.mix(depth, found.streams[depth], batch).hidden_states
        torch.testing.assert_close(update, alone)
    for depth in range(4):
        after = model.model.run(range(depth, depth + 1), found.streams[depth], batch).hidden_states
        torch.testing.assert_close(found.streams[depth + 1], after)
    assert not torch.allclose(found.mixers[0], found.mixers[2])


def test_only_what_is_wanted_is_kept_and_no_hook_stays(make_source):
    model = load(make_source())
    found = observe(model, TOKENS, POSITIONS, frozenset[Want]({"predictions"}))
    assert (found.streams, found.mixers, found.attentions) == ([], {}, {})
    observe(model, TOKENS, POSITIONS, EVERYTHING - frozenset[Want]({"attentions"}))
    layers = model.model.layers
    assert not any(module._forward_hooks or module._forward_pre_hooks for layer in layers for module in layer.modules())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpoints", [False, True])
def test_gradients_pass_through_what_is_observed(make_source, checkpoints):
    gradients = []
    for on in (False, checkpoints):
        model = load(make_source()).train()
        if on:
            model.gradient_checkpointing_enable()
        found = observe(model, TOKENS, POSITIONS, frozenset[Want]({"streams", "mixers"}))
        torch.cat([part.flatten() for part in (*found.streams, *found.mixers.values())]).square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0])


def test_attention_that_writes_nothing_down_is_refused(make_source):
    with pytest.raises(HealError, match=r"eager attention is required to read attention weights \(got sdpa\); load"):
        observe(load(make_source(), "sdpa"), TOKENS, POSITIONS, EVERYTHING)


def test_layers_that_are_elsewhere_are_refused(make_source):
    model = load(make_source())
    model.config.num_hidden_layers = 5
    with pytest.raises(HealError, match=r"layers that can be observed are required \(LlamaForCausalLM has other ones"):
        observe(model, TOKENS, POSITIONS, frozenset[Want]({"streams"}))


@torch.no_grad()
def test_a_teacher_with_vision_shows_its_text_part():
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "vocab_size": 96,
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = Gemma3TextConfig(**sizes)
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    whole = Gemma3ForConditionalGeneration(config).eval()
    alone = Gemma3ForCausalLM(text).eval()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    found, expected = (observe(model, TOKENS, POSITIONS, frozenset({"streams", "mixers"})) for model in (whole, alone))
    assert len(found.streams) == 4
    for ours, theirs in zip(found.streams, expected.streams, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found.mixers.keys() == expected.mixers.keys() == {0, 1, 2}
    for layer, ours in found.mixers.items():
        torch.testing.assert_close(ours, expected.mixers[layer])
