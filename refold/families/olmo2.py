"""OLMo 2: Llama with output norms instead of input norms, and query/key norms over all heads at once."""

from collections.abc import Mapping
from typing import Any

from refold.families.arch import ArchSpec, Family, Norm, TensorRule
from refold.families.llama import ATTENTION_LINEARS, IGNORED, LAYER, MLP_LINEARS, OUTSIDE, linear_rules
from refold.families.qwen3 import QK_NORMS
from refold.families.reading import (
    only_layer,
    read_activation,
    read_decoder,
    read_or,
    read_rope,
    require,
    same_layers,
    write_decoder,
    write_rope,
)


def read_config(config: Mapping[str, Any]) -> ArchSpec:
    sizes = read_decoder(config, max_positions=2048)
    rope = read_rope(config, sizes["head_dim"], sizes["max_position_embeddings"])
    attention_bias = read_or(config, "attention_bias", False)
    return ArchSpec(
        family="olmo2",
        **sizes,
        layers=same_layers(require(config, "num_hidden_layers"), None, rope.model_copy(update={"float32_turn": True})),
        norm=Norm(kind="rms", eps=read_or(config, "rms_norm_eps", 1e-5), float32_scale=True),
        activation=read_activation(config, "hidden_act", "silu"),
        input_norms=False,
        output_norms=True,
        qk_norm="full",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
    )


def write_config(arch: ArchSpec) -> dict[str, Any]:
    layer = only_layer(arch.layers, "olmo2")
    assert layer.rope is not None
    return {
        **write_decoder(arch),
        "attention_bias": arch.qkv_bias,
        "rms_norm_eps": arch.norm.eps,
        "rope_parameters": write_rope(layer.rope, arch.head_dim),
    }


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    url="https://arxiv.org/abs/2501.00656",
    read_config=read_config,
    write_config=write_config,
    rules=(
        *OUTSIDE,
        TensorRule(f"{LAYER}.post_attention_layernorm.weight", ("mixer.output_norm.weight",)),
        TensorRule(f"{LAYER}.post_feedforward_layernorm.weight", ("mlp.output_norm.weight",)),
        *linear_rules(LAYER, "self_attn", "mixer", ATTENTION_LINEARS),
        *linear_rules(LAYER, "mlp", "mlp", MLP_LINEARS),
        *QK_NORMS,
    ),
    ignored=IGNORED,
)
