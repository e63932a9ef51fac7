"""Architectures of llama.cpp that hold unrolled models: tensor names, order of rotary rows, biases and conventions."""

from collections.abc import Mapping
from dataclasses import dataclass, field

ATTENTION = {
    "attn_q": ("mixer.q_proj",),
    "attn_k": ("mixer.k_proj",),
    "attn_v": ("mixer.v_proj",),
    "attn_output": ("mixer.o_proj",),
}
GATED_MLP = {"ffn_gate": ("mlp.gate_proj",), "ffn_up": ("mlp.up_proj",), "ffn_down": ("mlp.down_proj",)}
INPUT_NORMS = {"attn_norm": ("mixer.input_norm",), "ffn_norm": ("mlp.input_norm",)}
OUTPUT_NORMS = {"post_attention_norm": ("mixer.output_norm",), "post_ffw_norm": ("mlp.output_norm",)}
QK_NORMS = {"attn_q_norm": ("mixer.q_norm",), "attn_k_norm": ("mixer.k_norm",)}
PACKED_ATTENTION = {
    "attn_qkv": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
    "attn_output": ("mixer.o_proj",),
}
QKV_BIASES = frozenset({"attn_q", "attn_k", "attn_v"})
LLAMA = {**INPUT_NORMS, **ATTENTION, **GATED_MLP}
SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")


@dataclass(frozen=True)
class GgufLayout:
    """One architecture of llama.cpp for models whose layers all have attention and an MLP.

    Attributes:
        name: The value of `general.architecture`.
        tensors: Canonical weights, packed by rows, by the tensor's name in a block.
        activations: Activations of the MLP that the architecture computes.
        turns_heads: Whether rows of queries and keys stand in pairs (rotary type `norm`).
        biases: Tensors that may have a bias.
        forced_biases: Tensors that must have a bias; zeros are written where the model has none.
        needs_head: Whether an output matrix is required even if it is tied to the embedding.
        takes_head: Whether an output matrix of its own is allowed.
        square: Whether all query heads together must be as wide as the hidden size.
        has_rope_factors: Whether the architecture reads `rope_freqs.weight`, which `llama3` scaling needs.
        window_period: Default period of layers with and without a window; 0: the architecture computes no windows.
        odd_scale_layers: Number of layers for which llama.cpp scales scores by `(hidden / heads) ** -0.5` instead of
            `head_dim ** -0.5`; 0: none.
        embedding_scaled: Whether the architecture multiplies embeddings by the root of the hidden size.
        softcaps: Whether scores and logits are capped.
        forced_softcaps: Whether both caps are computed in any case.
    """

    name: str
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: LLAMA)
    activations: tuple[str, ...] = SILU
    turns_heads: bool = False
    biases: frozenset[str] = QKV_BIASES
    forced_biases: frozenset[str] = frozenset()
    needs_head: bool = False
    takes_head: bool = True
    square: bool = False
    has_rope_factors: bool = False
    window_period: int = 0
    odd_scale_layers: int = 0
    embedding_scaled: bool = False
    softcaps: tuple[str, ...] = ()
    forced_softcaps: bool = False


_LLAMA = GgufLayout(
    "llama",
    turns_heads=True,
    biases=frozenset({*ATTENTION, *GATED_MLP}),
    has_rope_factors=True,
)
_GEMMA = {"activations": GELU, "takes_head": False, "embedding_scaled": True}
_SANDWICH = {**LLAMA, **OUTPUT_NORMS}

LAYOUTS: Mapping[str, GgufLayout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": GgufLayout("qwen2", square=True),
    "qwen3": GgufLayout("qwen3", {**LLAMA, **QK_NORMS}),
    "gemma": GgufLayout("gemma", **_GEMMA),
    "gemma2": GgufLayout(
        "gemma2",
        _SANDWICH,
        **_GEMMA,
        window_period=2,
        odd_scale_layers=46,
        softcaps=("attention", "logits"),
        forced_softcaps=True,
    ),
    "gemma3": GgufLayout(
        "gemma3",
        {**_SANDWICH, **QK_NORMS},
        **_GEMMA,
        window_period=6,
        odd_scale_layers=62,
        softcaps=("logits",),
    ),
    "olmo2": GgufLayout("olmo2", {**ATTENTION, **QK_NORMS, **OUTPUT_NORMS, **GATED_MLP}, needs_head=True, square=True),
    "phi3": GgufLayout(
        "phi3",
        {
            **INPUT_NORMS,
            **PACKED_ATTENTION,
            "ffn_up": ("mlp.gate_proj", "mlp.up_proj"),
            "ffn_down": ("mlp.down_proj",),
        },
        square=True,
    ),
    "gpt_neox": GgufLayout(
        "gptneox",
        {**INPUT_NORMS, **PACKED_ATTENTION, "ffn_up": ("mlp.up_proj",), "ffn_down": ("mlp.down_proj",)},
        activations=GELU,
        biases=frozenset({"attn_norm", "ffn_norm", "attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
        forced_biases=frozenset({"attn_qkv", "attn_output"}),
        needs_head=True,
        square=True,
    ),
}
"""Layout by the family's `model_type`."""


def find_layout(family: str) -> GgufLayout | None:
    """Returns the layout of a family; None: llama.cpp has no architecture for it here."""
    return LAYOUTS.get("gemma3" if family == "gemma3_text" else family)
