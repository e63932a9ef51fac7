"""A Gemma 3 with vision is read as its text part, with both spellings of tensor names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from refold.conversion.convert import convert
from refold.errors import SourceError
from refold.exporting.export import export
from refold.modeling.load import load_model
from refold.planning.plan import plan

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "eos_token_id": 95,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module", params=["language_model.model.", "model.language_model."])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=94)
    model = Gemma3ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in tensors)
    if request.param == "model.language_model.":
        tensors = {_later_name(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _later_name(name: str) -> str:
    head, _, rest = name.partition("language_model.model.")
    return f"model.language_model.{rest}" if rest else f"model.{head}"


def test_the_text_part_is_converted_and_the_rest_is_named(source: Path, tmp_path: Path):
    made = convert(source, tmp_path / "out")
    ignored = {line.tensors: line for line in made.lines if line.how == "ignored"}
    assert len(ignored) == 2
    for part in ("vision_tower", "multi_modal_projector"):
        (line,) = (line for name, line in ignored.items() if part in name)
        assert line.reason == "refold uses only the text part"
    tokens = torch.randint(2, 90, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        ours = load_model(tmp_path / "out", device="cpu")(tokens).logits
        theirs = load_model(source, device="cpu")(tokens).logits
        exported = AutoModelForCausalLM.from_pretrained(export(tmp_path / "out", tmp_path / "stock"))
        stock = exported(tokens).logits
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 2e-5
    assert float((stock - theirs).abs().max() / theirs.abs().max()) < 2e-5
    assert exported.config.model_type == "gemma3_text"
    assert exported.config.eos_token_id == 95


def test_a_missing_tensor_is_named_as_the_checkpoint_names_its_others(source: Path, tmp_path: Path):
    tensors = load_file(source / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("layers.2.mlp.up_proj.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text())))
    with pytest.raises(SourceError, match=rf"1 required tensor missing: {name}"):
        plan(tmp_path)
