"""Defaults and values read from `config.json`, against transformers' config of the same file."""

import copy
from typing import Any

import pytest
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from refold.errors import SourceError
from refold.families.arch import Rope
from refold.families.registry import FAMILIES, find_family, read_arch

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

GATED = [
    {},
    {"num_key_value_heads": 2, "head_dim": 32},
    {"head_dim": None},
    {"rms_norm_eps": 1e-5, "hidden_act": "gelu", "initializer_range": 0.01},
    {"tie_word_embeddings": True, "max_position_embeddings": 512},
    {"rope_theta": 500000.0},
    {"rope_theta": 500000.0, "rope_scaling": None},
    {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 256}, "rope_theta": 500000.0},
    {"rope_scaling": LLAMA3, "max_position_embeddings": 1024},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 777.0},
    {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 256}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 99.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "beta_fast": 16.0, "truncate": False}},
]
GROUPED = {"num_key_value_heads": 4}
WINDOWS = [
    {"use_sliding_window": True, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    {"sliding_window": 16, "max_window_layers": 0},
]
CAPS = [
    {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    {"sliding_window": 16, "query_pre_attn_scalar": 144, "attention_bias": True},
    {"final_logit_softcapping": 9.0, "attn_logit_softcapping": None},
    {"final_logit_softcapping": None, "hidden_activation": "gelu", "tie_word_embeddings": False},
    {"hidden_size": 48, "head_dim": 16, "max_position_embeddings": 77, "rms_norm_eps": 1e-5},
]
GEMMA3 = [
    *CAPS,
    {"sliding_window_pattern": 2},
    {"rope_theta": 99.0, "rope_local_base_freq": 9.0},
    {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6},
    {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 99.0}}},
    {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 99.0}}},
]
VARIANTS = [
    *((LlamaConfig, extra) for extra in (*GATED, {"attention_bias": True}, {"mlp_bias": True})),
    *(
        (MistralConfig, extra)
        for extra in (*GATED, {"sliding_window": None}, {"sliding_window": 16}, {"num_key_value_heads": 4})
    ),
    *(
        (GPTNeoXConfig, extra)
        for extra in (
            {},
            {"rotary_pct": 0.5, "rotary_emb_base": 5000},
            {"rotary_pct": 1.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            {"use_parallel_residual": False, "attention_bias": False, "layer_norm_eps": 1e-6},
            {"hidden_act": "gelu_new", "tie_word_embeddings": True, "max_position_embeddings": 64},
        )
    ),
    # Null says in transformers' Qwen2 and OLMo 2 what it says in Llama; the others' configs refuse it.
    *((Qwen2Config, {**GROUPED, **extra}) for extra in (*GATED, *WINDOWS) if extra != {"head_dim": None}),
    *(
        (Qwen3Config, {**GROUPED, **extra})
        for extra in (*GATED, *WINDOWS, {"attention_bias": True})
        if extra != {"head_dim": None}
    ),
    *((Olmo2Config, extra) for extra in (*GATED, {"attention_bias": True}) if extra != {"head_dim": None}),
    *(
        (GemmaConfig, {**GROUPED, **extra})
        for extra in (
            {},
            {"hidden_act": "gelu"},
            {"hidden_act": "relu", "attention_bias": True, "head_dim": 16, "tie_word_embeddings": False},
            {"rope_theta": 99.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 77},
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        )
    ),
    *((Gemma2Config, extra) for extra in ({}, *CAPS, {"rope_theta": 99.0})),
    *((Gemma3TextConfig, extra) for extra in ({}, *GEMMA3)),
    *(
        (Phi3Config, extra)
        for extra in (
            {},
            {"num_key_value_heads": 2, "sliding_window": 16, "rms_norm_eps": 1e-6},
            {"partial_rotary_factor": 0.75, "rope_theta": 99.0},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5}},
            {"tie_word_embeddings": True, "max_position_embeddings": 77},
        )
    ),
]
GEMMAS = (GemmaConfig, Gemma2Config, Gemma3TextConfig)


def _config(kind: Any, extra: dict) -> dict[str, Any]:
    # Deep enough a copy: transformers writes into the dictionaries it is given.
    copied = {key: dict(value) if isinstance(value, dict) else value for key, value in extra.items()}
    return {"model_type": kind.model_type, **SIZES, **copied}


@pytest.mark.parametrize(("kind", "extra"), VARIANTS, ids=lambda each: getattr(each, "model_type", str(each))[:60])
def test_fields_are_those_transformers_resolves(kind, extra):
    arch = read_arch(_config(kind, extra))
    theirs = kind.from_dict(_config(kind, extra))

    for name in (*SIZES, "max_position_embeddings", "initializer_range"):
        ours = arch.num_layers if name == "num_hidden_layers" else getattr(arch, name)
        assert ours == getattr(theirs, name), name
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert arch.head_dim == head_dim
    assert arch.attention_scale == getattr(theirs, "query_pre_attn_scalar", head_dim) ** -0.5
    assert arch.num_key_value_heads == getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    assert arch.activation == (getattr(theirs, "hidden_activation", None) or theirs.hidden_act)
    assert arch.tied_head == theirs.tie_word_embeddings
    assert arch.norm.eps == (theirs.layer_norm_eps if kind is GPTNeoXConfig else theirs.rms_norm_eps)
    assert arch.qkv_bias == getattr(theirs, "attention_bias", kind is Qwen2Config)
    assert arch.o_bias == getattr(theirs, "attention_bias", False)
    assert arch.mlp_bias == getattr(theirs, "mlp_bias", kind is GPTNeoXConfig)
    assert (arch.residual == "parallel") == getattr(theirs, "use_parallel_residual", False)
    assert arch.attention_softcap == (theirs.attn_logit_softcapping if kind is Gemma2Config else None)
    assert arch.logit_softcap == getattr(theirs, "final_logit_softcapping", None)
    assert (arch.embedding_scale, arch.norm.offset) == ((arch.hidden_size**0.5, 1) if kind in GEMMAS else (1, 0))

    types = getattr(theirs, "layer_types", None)
    for index, layer in enumerate(arch.layers):
        is_full = types is not None and types[index] == "full_attention"
        assert layer.window == (None if is_full else getattr(theirs, "sliding_window", None))
        assert layer.rope is not None
        given = theirs.rope_parameters
        given = dict(given[types[index]] if kind is Gemma3TextConfig and types else given)
        assert layer.rope.kind == given.pop("rope_type")
        assert layer.rope.theta == given.pop("rope_theta")
        assert layer.rope.rotary_dim == int(head_dim * given.pop("partial_rotary_factor", 1.0))
        given.pop("type", None)
        assert layer.rope.scaling == given


@pytest.mark.parametrize(("kind", "extra"), VARIANTS, ids=lambda each: getattr(each, "model_type", str(each))[:60])
def test_written_config_reads_back_to_the_same_architecture(kind, extra):
    arch = read_arch(_config(kind, extra))
    written = {"model_type": arch.family, **find_family(arch.family).write_config(arch)}
    assert read_arch(written) == arch
    resolved = kind.from_dict(dict(written)).to_dict()
    assert read_arch({**resolved, "model_type": arch.family}) == arch


def test_llama_rotates_whole_heads_whatever_the_config_says():
    # transformers' Llama never looks at the share for the default kind.
    rope = read_arch({"model_type": "llama", **SIZES, "partial_rotary_factor": 0.5}).layers[0].rope
    assert rope is not None
    assert rope.rotary_dim == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "lama"},
            r"model_type: must be one of llama, mistral, gpt_neox, .* \(got 'lama'\); did you mean",
        ),
        ({"model_type": None}, r"model_type: must be one of .* \(got None\)"),
        ({"hidden_size": None}, r"`hidden_size` is required \(not there\)"),
        ({"hidden_size": "64"}, r"`hidden_size` must be a positive whole number, at most [0-9,]+ \(got '64'\)"),
        (
            {"num_attention_heads": 0},
            r"`num_attention_heads` must be a positive whole number, .* \(got 0\)",
        ),
        ({"head_dim": "x"}, r"`head_dim` must be a positive whole number, at most [0-9,]+ \(got 'x'\)"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads: must divide num_attention_heads \(got 3 and 8\)"),
        ({"hidden_act": "mish"}, r"hidden_act: must be one of silu, .* \(got 'mish'\)"),
        ({"rms_norm_eps": "tiny"}, r"`rms_norm_eps` must be a number from 0 to 1 \(got 'tiny'\)"),
        (
            {"rope_scaling": {"type": "ntk"}},
            r"rope kind must be one of default, linear, llama3, dynamic, yarn \(got 'ntk'\)",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"rope kind linear needs factor \(not there\)"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, r"needs low_freq_factor, high_freq_factor"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            r"rope kind must be default for phi3 \(got 'longrope', .*\); take a model without it",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            r"rope kind must be one of default \(got 'dynamic'\)",
        ),
        (
            {"model_type": "gemma2", "use_bidirectional_attention": True},
            r"use_bidirectional_attention must be false \(got true: .*; take a causal model",
        ),
        (
            {"model_type": "gemma2", "layer_types": ["full_attention"]},
            r"layer_types: one of each layer is required \(got 1 of 3\)",
        ),
        (
            {"model_type": "gemma2", "layer_types": ["full_attention", "chunked_attention", "full_attention"]},
            r"layer_types: must be one of full_attention, sliding_attention \(got 'chunked_attention'\)",
        ),
        (
            {"model_type": "gemma2", "sliding_window": None},
            r"`sliding_window` is required by the sliding_attention layers \(got None\)",
        ),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(change, message):
    with pytest.raises(SourceError, match=message):
        read_arch({"model_type": "llama", **SIZES, **change})


def test_layers_that_differ_cannot_be_written_as_a_family_of_equal_layers():
    arch = read_arch({"model_type": "mistral", **SIZES})
    mixed = arch.model_copy(update={"layers": (arch.layers[0].model_copy(update={"window": None}), *arch.layers[1:])})
    with pytest.raises(SourceError, match="mistral: all layers must have one window and one rope"):
        FAMILIES["mistral"].write_config(mixed)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gemma2", {"window": 5}, r"gemma2: all windows must have one size .* \(got \[5, 4096\]\)"),
        ("qwen2", {"rope": Rope(theta=9.0, rotary_dim=8)}, r"qwen2: all layers must have one rope to be written as"),
        ("gemma3_text", {"rope": None}, r"gemma3_text: all layers with a window must have one rope to be written"),
    ],
)
def test_what_a_family_cannot_express_is_not_written(kind, change, message):
    arch = read_arch({"model_type": kind, **SIZES, **GROUPED})
    layers = (arch.layers[0].model_copy(update=change), *arch.layers[1:])
    with pytest.raises(SourceError, match=message):
        FAMILIES[kind].write_config(arch.model_copy(update={"layers": layers}))


def test_layers_of_one_kind_alone_can_be_written():
    # Dropping layers may leave none of a kind.
    arch = read_arch({"model_type": "gemma3_text", **SIZES, "rope_local_base_freq": 77.0})
    written = {"model_type": "gemma3_text", **find_family("gemma3_text").write_config(arch)}
    assert {layer.window for layer in arch.layers} == {4096}
    assert read_arch(written) == arch


GEMMA3_4B = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model"},
}


def test_a_model_with_vision_is_read_as_its_text_part():
    arch = read_arch(GEMMA3_4B)
    # transformers writes into the dictionaries it is given.
    text = Gemma3Config.from_dict(copy.deepcopy(GEMMA3_4B)).to_dict()["text_config"]
    assert arch == read_arch({**text, "model_type": "gemma3_text"})
    assert (arch.family, arch.num_layers, arch.vocab_size, arch.tied_head) == ("gemma3_text", 34, 262208, True)
    assert [layer.window for layer in arch.layers[:6]] == [1024] * 5 + [None]
    assert {layer.rope.kind for layer in arch.layers if layer.rope and layer.window is None} == {"linear"}
    assert not read_arch({**GEMMA3_4B, "tie_word_embeddings": False}).tied_head


def test_every_family_names_its_source_and_one_rule_for_each_piece():
    for name, family in FAMILIES.items():
        assert family.model_type == name
        assert family.url.startswith("https://")
        pieces = [piece for rule in family.rules for piece in rule.pieces]
        assert len(pieces) == len(set(pieces))
        for spelling in family.spellings:
            assert [rule.pieces for rule in spelling] == [rule.pieces for rule in family.rules]
            assert not {rule.source for rule in spelling} & {rule.source for rule in family.rules}
