"""The identity fold of every kind of source is the source."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from refold.conversion.convert import convert
from refold.errors import FolderError
from refold.modeling.load import computes_fast, load_model
from refold.modeling.model import RefoldForCausalLM

VARIANTS = (
    "llama",
    "llama-mha-bias",
    "llama-mqa-mlp-bias",
    "llama-linear",
    "llama-llama3",
    "llama-v4",
    "mistral-window",
    "mistral-full",
    "mistral-head-dim",
    "gpt_neox",
    "gpt_neox-sequential",
    "gpt_neox-v4",
    "gpt_neox-tied",
    "gpt_neox-yarn",
    "llama-yarn",
    "llama-dynamic",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "qwen3-window",
    "gemma",
    "gemma-bias",
    "gemma2",
    "gemma2-v4",
    "gemma3_text",
    "gemma3_text-v4",
    "olmo2",
    "olmo2-bias",
    "phi3",
    "phi3-window",
)
# transformers runs no Gemma 2 with scaled_dot_product_attention, which cannot cap scores.
NO_SDPA = [("gemma2", "sdpa"), ("gemma2-v4", "sdpa")]
TOLERANCE = 2e-5


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, as a share of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(
    ("variant", "attn"),
    [(variant, attn) for variant in VARIANTS for attn in ("eager", "sdpa") if (variant, attn) not in NO_SDPA],
)
def test_logits_are_the_sources(load, load_source, tokens, variant, attn):
    with torch.no_grad():
        ours, theirs = load(variant, attn=attn)(tokens).logits, load_source(variant, attn)(tokens).logits
    assert difference(ours, theirs) < TOLERANCE
    assert theirs.std() > 0.3


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_generation_is_the_sources(load, load_source, tokens, variant):
    arguments = {"inputs": tokens[:1], "max_new_tokens": 32, "do_sample": False}
    assert torch.equal(load(variant).generate(**arguments), load_source(variant).generate(**arguments))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize(
    "variant",
    ["llama", "mistral-window", "gpt_neox", "qwen2-window", "gemma2", "gemma3_text", "olmo2", "phi3-window"],
)
def test_generation_of_a_left_padded_batch_is_the_sources(load, load_source, tokens, variant, options):
    padded = tokens.clone()
    padded[1, :9] = 0
    arguments = {"attention_mask": (padded != 0).long(), "max_new_tokens": 8, "do_sample": False, **options}
    ours = load(variant).generate(padded, **arguments)
    assert torch.equal(ours, load_source(variant).generate(padded, **arguments))
    alone = load(variant).generate(padded[1:, 9:], **{**arguments, "attention_mask": None})
    assert torch.equal(ours[1, 9:], alone[0])


@torch.no_grad()
def test_dynamic_ropes_depend_on_the_length_alone(load, load_source, tokens):
    model, part = load("llama-dynamic"), tokens[:, :20]
    expected = load_source("llama-dynamic")(part).logits
    longer = model(tokens).logits
    assert difference(model(part).logits, expected) < TOLERANCE
    # Sixteen tokens are what it was made for; four more stretch all frequencies.
    assert difference(longer[:, :20], expected) > 100 * TOLERANCE


def test_sampling_with_a_seed_is_the_sources(load, load_source, tokens):
    sampled = []
    for model in (load("llama"), load_source("llama")):
        torch.manual_seed(5)
        sampled.append(model.generate(tokens, max_new_tokens=8, do_sample=True, temperature=3.0))
    assert torch.equal(*sampled)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "variant", ["llama-llama3", "gpt_neox", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3-window"]
)
def test_half_precision_logits_are_the_sources_bit_for_bit(make_source, tmp_path, tokens, variant, dtype):
    source = make_source(variant, dtype=dtype)
    convert(source, tmp_path / "out")
    ours = load_model(tmp_path / "out", device="cpu", dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(source)
    assert ours.dtype == getattr(torch, dtype)
    with torch.no_grad():
        mine, other = ours(tokens).logits, theirs(tokens).logits
    if computes_fast(ours.dtype, ours.device):
        assert torch.equal(mine, other)
    else:
        # Loops of CPUs without instructions for it add up in an order that follows strides: a last bit may differ.
        assert difference(mine.float(), other.float()) < torch.finfo(ours.dtype).eps


def test_hidden_states_and_attentions_are_the_sources(load, load_source, tokens):
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        ours, theirs = load("llama", attn="eager")(tokens, **wanted), load_source("llama", "eager")(tokens, **wanted)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 5
    assert len(ours.attentions) == len(theirs.attentions) == 4
    for mine, other in zip(ours.hidden_states + ours.attentions, theirs.hidden_states + theirs.attentions, strict=True):
        assert difference(mine, other) < TOLERANCE


def test_loss_and_gradients_are_the_sources(load, load_source, tokens):
    ours, theirs = load("llama-llama3").train(), load_source("llama-llama3").train()
    losses = [model(tokens, labels=tokens).loss for model in (ours, theirs)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    for index, layer in enumerate(theirs.model.layers):
        mine = ours.model.mixers[index].k_proj.weight.grad
        assert difference(mine, layer.self_attn.k_proj.weight.grad) < TOLERANCE
    assert difference(ours.lm_head.weight.grad, theirs.lm_head.weight.grad) < TOLERANCE


def test_a_saved_model_gives_the_same_bits(load, tokens, tmp_path):
    recipe = {"fold": {"loops": 2}, "relax": {"rank": 4, "vectors": "own"}}
    model = load("gpt_neox", recipe)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, RefoldForCausalLM)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert model.state_dict().keys() == again.state_dict().keys()


def test_a_converted_folder_gives_the_same_bits_each_time(load, tokens):
    recipe = {"fold": {"loops": 2}, "relax": {"rank": 4}}
    with torch.no_grad():
        assert torch.equal(load("llama", recipe)(tokens).logits, load("llama", recipe)(tokens).logits)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: tensors.pop("model.mlps.1.up_proj.weight"),
            r"1 missing keys: model\.mlps\.1\.up_proj\.weight",
        ),
        (lambda tensors: tensors.update({"model.extra": torch.zeros(1)}), r"1 unexpected keys: model\.extra"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)}),
            r"1 mismatched keys: .*model\.norm\.weight",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_blueprint_are_refused(fold, tmp_path, edit, message):
    tensors = load_file(fold("llama") / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((fold("llama") / "config.json").read_text())
    with pytest.raises(FolderError, match=message):
        RefoldForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_unknown_attention_is_refused(fold):
    with pytest.raises(ValueError, match="nonsense"):
        RefoldForCausalLM.from_pretrained(fold("llama"), attn_implementation="nonsense")


def test_the_config_says_what_other_tools_read(fold):
    config = json.loads((fold("mistral-head-dim") / "config.json").read_text())
    expected = {
        "model_type": "refold",
        "architectures": ["RefoldForCausalLM"],
        "num_hidden_layers": 4,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "sliding_window": 5,
        "layer_types": ["sliding_attention"] * 4,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "eos_token_id": 96,
    }
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K", "books-10m"])
def test_real_models_are_the_same(material, tmp_path, name):
    source = material / "models" / name
    convert(source, tmp_path / "out")
    ours: Any = load_model(tmp_path / "out", device="cpu", dtype="float32")
    theirs: Any = load_model(source, device="cpu", dtype="float32")
    prompt = torch.randint(3, 400, (1, 24), generator=torch.Generator().manual_seed(3))
    arguments = {"max_new_tokens": 64, "do_sample": False}
    with torch.no_grad():
        assert difference(ours(prompt).logits, theirs(prompt).logits) < TOLERANCE
    assert torch.equal(ours.generate(prompt, **arguments), theirs.generate(prompt, **arguments))


@torch.no_grad()
def test_fused_rows_taken_in_the_wrong_order_are_seen(load, load_source, tokens):
    ours, theirs = load("gpt_neox"), load_source("gpt_neox")
    for index, mixer in enumerate(ours.model.mixers):
        fused = theirs.gpt_neox.layers[index].attention.query_key_value.weight
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            getattr(mixer, name).weight.copy_(fused[part * 32 : (part + 1) * 32])
    assert difference(ours(tokens).logits, theirs(tokens).logits) > 100 * TOLERANCE
