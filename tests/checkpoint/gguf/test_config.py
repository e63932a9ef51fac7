from collections.abc import Mapping
from typing import Any

import pytest

from refold.checkpoint.gguf.config import make_config
from refold.errors import SourceError
from refold.families.registry import read_arch

LLAMA = {
    "general.architecture": "llama",
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
SHAPES = {"token_embd.weight": (96, 32), "output.weight": (96, 32)}


def renamed(architecture: str, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = {key.replace("llama", architecture): value for key, value in LLAMA.items()}
    named = {f"{architecture}.{key.replace('__', '.')}": value for key, value in fields.items()}
    return {**found, "general.architecture": architecture, **named}


def made(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Any]:
    return make_config("m.gguf", metadata, shapes, lambda theta: {})


def test_absent_keys_have_the_defaults_of_llama_cpp() -> None:
    config = made(LLAMA)
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 4
    assert config["head_dim"] == 8
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert not config["tie_word_embeddings"]
    assert made(LLAMA, {"token_embd.weight": (96, 32)})["tie_word_embeddings"]
    assert read_arch(config).vocab_size == 96


def test_equal_numbers_of_all_layers_are_one_number() -> None:
    assert made({**LLAMA, "llama.attention.head_count_kv": (2, 2)})["num_key_value_heads"] == 2


def test_a_window_makes_a_model_of_mistral() -> None:
    config = made({**LLAMA, "llama.attention.sliding_window": 16})
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 16)


@pytest.mark.parametrize(("num_layers", "wanted"), [(46, 16), (4, 24)])
def test_only_the_largest_gemma_scales_queries_by_its_width(num_layers: int, wanted: int) -> None:
    fields = {"block_count": num_layers, "attention__key_length": 24, "embedding_length": 64}
    for architecture in ("gemma2", "gemma3"):
        deep = {**fields, "block_count": num_layers if architecture == "gemma2" or num_layers < 9 else 62}
        assert made(renamed(architecture, **deep))["query_pre_attn_scalar"] == wanted


def test_windows_of_gemma_follow_the_period() -> None:
    config = made(renamed("gemma3", block_count=7, attention__sliding_window=16))
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    config = made(renamed("gemma3", block_count=3, attention__sliding_window=8, attention__sliding_window_pattern=2))
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert made(renamed("gemma3", block_count=2))["layer_types"] == ["full_attention"] * 2


def test_attention_factors_are_those_of_transformers() -> None:
    config = made(
        renamed("qwen2", rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__attn_factor=0.5)
    )
    assert config["rope_parameters"]["attention_factor"] == pytest.approx(0.5 * 1.1386294)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({}, r"m.gguf: metadata general.architecture is required \(not there\)"),
    "adapter": ({**LLAMA, "general.type": "adapter"}, r"a language model is required \(got a LoRA adapter\); merge it"),
    "mmproj": ({**LLAMA, "general.type": "mmproj"}, r"got the projector of a vision or audio model\); give the GGUF"),
    "clip": ({"general.architecture": "clip"}, r"got the projector of a vision or audio model"),
    "imatrix": ({"general.type": "imatrix"}, r"got an importance matrix for quantisation\)"),
    "vocab": ({**LLAMA, "general.type": "vocab"}, r"got a vocabulary without weights"),
    "unknown": (renamed("starship"), r"general.architecture: must be one of gemma, .* \(got 'starship'\)"),
    "recurrent": (renamed("mamba"), r"general.architecture: must be one of .*got 'mamba', a recurrent or hybrid model"),
    "experts": (renamed("qwen3moe"), r"got 'qwen3_moe', a mixture of experts"),
    "mixtral": ({**LLAMA, "llama.expert_count": 8}, r"one MLP in each layer is required \(got a mixture of experts"),
    "list": ({**LLAMA, "general.architecture": ("llama",)}, r"general.architecture: must be one of"),
    "missing": ({k: v for k, v in LLAMA.items() if "block" not in k}, r"llama.block_count is required \(not there\)"),
    "text": ({**LLAMA, "llama.block_count": "2"}, r"llama.block_count: a whole number from 0 is required \(got '2'\)"),
    "negative": ({**LLAMA, "llama.embedding_length": -1}, r"llama.embedding_length: a whole number from 0 .* -1"),
    "flag": ({**LLAMA, "llama.block_count": True}, r"llama.block_count: a whole number from 0 .*True"),
    "no heads": ({**LLAMA, "llama.attention.head_count": 0}, r"head_count: a positive number is required \(got 0\)"),
    "heads by layer": ({**LLAMA, "llama.attention.head_count": (4, 2)}, r"one number for all layers is required"),
    "empty list": ({**LLAMA, "llama.attention.head_count": ()}, r"head_count: a whole number from 0 is required"),
    "nan": ({**LLAMA, "llama.rope.freq_base": float("nan")}, r"llama.rope.freq_base: a finite number is required"),
    "values": (
        {**LLAMA, "llama.attention.value_length": 4},
        r"value_length: 8, the length of keys, is required \(got 4",
    ),
    "partial": (
        {**LLAMA, "llama.rope.dimension_count": 4},
        r"rope.dimension_count: 8, the size of a head, is required",
    ),
    "rotated": (renamed("phi3", rope__dimension_count=9), r"rope.dimension_count: a number from 1 to 8 is required"),
    "scaling": (renamed("qwen2", rope__scaling__type="x"), r"rope.scaling.type: must be one of none, linear, yarn"),
    "scaling type": (renamed("qwen2", rope__scaling__type=1), r"rope.scaling.type: a text is required \(got 1\)"),
    "parallel": (
        renamed("gptneox", use_parallel_residual=1, attention__layer_norm_epsilon=1e-5),
        r"gptneox.use_parallel_residual: true or false is required \(got 1\)",
    ),
    "olmo3": (renamed("olmo2", attention__sliding_window=8), r"a model of OLMo 2, without a window, is required"),
    "pattern": (
        renamed("gemma3", attention__sliding_window=8, attention__sliding_window_pattern=(True,)),
        r"sliding_window_pattern: a period, or a list of 2 truth values is required",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_wrong_metadata_is_named(fault: str) -> None:
    metadata, message = BAD[fault]
    with pytest.raises(SourceError, match=message):
        made(metadata)


def test_a_file_without_an_embedding_is_no_model() -> None:
    with pytest.raises(SourceError, match=r"tensor token_embd.weight is required \(not there\)"):
        made(LLAMA, {})


def test_a_long_rope_of_phi3_is_refused() -> None:
    config = made(renamed("phi3"), {**SHAPES, "rope_factors_long.weight": (4,)})
    with pytest.raises(SourceError, match=r"rope kind must be default for phi3 \(got 'longrope'"):
        read_arch(config)
