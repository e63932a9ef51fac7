"""Own defaults and readings of `config.json`, held against what transformers makes of the same file."""

from typing import Any

import pytest
from transformers import GPTNeoXConfig, LlamaConfig, MistralConfig

from refold.errors import SourceError
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
]


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
    assert arch.attention_scale == head_dim**-0.5
    assert arch.num_key_value_heads == getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    assert arch.activation == theirs.hidden_act
    assert arch.tied_head == theirs.tie_word_embeddings
    assert arch.norm.eps == (theirs.layer_norm_eps if kind is GPTNeoXConfig else theirs.rms_norm_eps)
    assert arch.qkv_bias == arch.o_bias == getattr(theirs, "attention_bias", False)
    assert arch.mlp_bias == getattr(theirs, "mlp_bias", kind is GPTNeoXConfig)
    assert (arch.residual == "parallel") == getattr(theirs, "use_parallel_residual", False)
    assert {layer.window for layer in arch.layers} == {getattr(theirs, "sliding_window", None)}

    rope = arch.layers[0].rope
    assert rope is not None
    given = dict(theirs.rope_parameters)
    assert rope.kind == given.pop("rope_type")
    assert rope.theta == given.pop("rope_theta")
    assert rope.rotary_dim == int(head_dim * given.pop("partial_rotary_factor", 1.0))
    given.pop("type", None)
    assert rope.scaling == given


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
        ({"model_type": "lama"}, r"model_type: must be one of llama, mistral, gpt_neox \(got 'lama'\); did you mean"),
        ({"model_type": None}, r"model_type: must be one of .* \(got None\)"),
        ({"hidden_size": None}, r"`hidden_size` is required \(not there\)"),
        ({"hidden_size": "64"}, r"`hidden_size` must be a positive whole number \(got '64'\)"),
        ({"num_attention_heads": 0}, r"`num_attention_heads` must be a positive whole number \(got 0\)"),
        ({"head_dim": "x"}, r"`head_dim` must be a positive whole number \(got 'x'\)"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads: must divide num_attention_heads \(got 3 and 8\)"),
        ({"hidden_act": "mish"}, r"hidden_act: must be one of silu, .* \(got 'mish'\)"),
        ({"rms_norm_eps": "tiny"}, r"config.json: eps: .* \(got 'tiny'\)"),
        ({"rope_scaling": {"type": "ntk"}}, r"rope kind must be one of default, linear, llama3 \(got 'ntk'\)"),
        ({"rope_scaling": {"type": "linear"}}, r"rope kind linear needs factor \(not there\)"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, r"needs low_freq_factor, high_freq_factor"),
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


def test_every_family_names_its_source_and_one_rule_for_each_piece():
    for name, family in FAMILIES.items():
        assert family.model_type == name
        assert family.url.startswith("https://")
        pieces = [piece for rule in family.rules for piece in rule.pieces]
        assert len(pieces) == len(set(pieces))
