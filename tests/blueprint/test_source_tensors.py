import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from refold.blueprint.source_tensors import locate_piece, source_tensors
from refold.families.registry import FAMILIES, find_family


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
        ("mistral", {}),
        ("gpt_neox", {}),
        ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True}),
        ("gemma", {"attention_bias": True}),
        ("gemma2", {}),
        ("gemma3_text", {"tie_word_embeddings": False}),
        ("olmo2", {"attention_bias": True}),
        ("phi3", {"head_dim": 16}),
    ],
)
def test_names_and_shapes_are_those_transformers_saves(make_arch, tmp_path, model_type, config):
    arch = make_arch(2, model_type, **config)
    written = find_family(model_type).write_config(arch)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, pad_token_id=0, **written)).save_pretrained(
        tmp_path
    )
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: each.shape for name, each in source_tensors(arch, find_family(model_type)).items()} == theirs


def test_a_tied_head_has_no_tensor(make_arch):
    arch = make_arch(1, tie_word_embeddings=True)
    assert "lm_head.weight" not in source_tensors(arch, find_family("llama"))


def test_pieces_of_a_fused_tensor_are_found_in_it(make_arch):
    family = find_family("gpt_neox")
    name, rule, index = locate_piece(family, "mixer.k_proj.bias", 3)
    assert (name, rule.layout, index) == ("gpt_neox.layers.3.attention.query_key_value.bias", "heads", 1)
    assert locate_piece(family, "lm_head.weight").name == "embed_out.weight"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_family_does_not_have_is_not_found(model_type):
    with pytest.raises(KeyError, match=rf"{model_type} has no mixer.r_proj.weight"):
        locate_piece(find_family(model_type), "mixer.r_proj.weight", 0)
