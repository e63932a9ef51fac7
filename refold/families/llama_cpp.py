"""llama.cpp's names for the families: architectures, tensors, and the order of their rows in GGUF files."""

from collections.abc import Mapping, Sequence
from typing import Literal

from refold.errors import SourceError
from refold.families.arch import Family
from refold.families.registry import FAMILIES
from refold.families.unsupported import explain_unsupported

ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "gpt_neox": "gptneox",
}
"""llama.cpp's `general.architecture` by `model_type`."""

_MODEL_TYPES: Mapping[str, str] = {
    **{architecture: family for family, architecture in reversed(ARCHITECTURES.items())},
    "gemma3": "gemma3_text",
}
_SPELLINGS: Mapping[str, str] = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "qwen3next": "qwen3_next",
    "gpt-oss": "gpt_oss",
    "deepseek2": "deepseek_v2",
    "glm4moe": "glm4_moe",
    "minimax-m2": "minimax",
    "granitehybrid": "granitemoehybrid",
    "falcon-h1": "falcon_h1",
    "kimi-linear": "kimi_linear",
    "command-r": "cohere",
    "phi2": "phi",
    "t5encoder": "t5",
}
"""`model_type` of unsupported architectures that llama.cpp spells differently."""

_STEMS: Mapping[tuple[str, ...], str] = {
    ("embed_tokens",): "token_embd",
    ("norm",): "output_norm",
    ("lm_head",): "output",
    ("mixer.input_norm",): "attn_norm",
    ("mixer.output_norm",): "post_attention_norm",
    ("mixer.q_proj",): "attn_q",
    ("mixer.k_proj",): "attn_k",
    ("mixer.v_proj",): "attn_v",
    ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"): "attn_qkv",
    ("mixer.o_proj",): "attn_output",
    ("mixer.q_norm",): "attn_q_norm",
    ("mixer.k_norm",): "attn_k_norm",
    ("mlp.input_norm",): "ffn_norm",
    ("mlp.output_norm",): "post_ffw_norm",
    ("mlp.gate_proj",): "ffn_gate",
    ("mlp.up_proj",): "ffn_up",
    ("mlp.gate_proj", "mlp.up_proj"): "ffn_up",
    ("mlp.down_proj",): "ffn_down",
}
ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with the factors by which the wavelengths of the `llama3` rope are stretched."""

RowOrder = Literal["same", "pairs", "projections"]
"""Order of the rows of a tensor in a GGUF file. `pairs`: the two halves of each head are interleaved, because
llama.cpp rotates neighbours for this architecture. `projections`: all rows of the queries, then of the keys, then of
the values, while the checkpoint has all rows of a head together."""


def tensor_name(pieces: Sequence[str], layer: int | None) -> str:
    """Returns llama.cpp's name of the tensor with these canonical pieces: `blk.3.attn_q.weight`."""
    stems, kinds = zip(*(piece.rsplit(".", 1) for piece in pieces), strict=True)
    name = f"{_STEMS[stems]}.{kinds[0]}"
    return name if layer is None else f"blk.{layer}.{name}"


def row_order(family: Family, pieces: Sequence[str]) -> RowOrder:
    """Returns the order of a tensor's rows in GGUF files of a family."""
    if len(pieces) == 3 and family.model_type == "gpt_neox":
        return "projections"
    linear = pieces[0].rsplit(".", 1)[0]
    rotated = linear in ("mixer.q_proj", "mixer.k_proj") and len(pieces) == 1
    return "pairs" if rotated and ARCHITECTURES[family.model_type] == "llama" else "same"


def find_model_type(architecture: object) -> str:
    """Returns the `model_type` of an architecture of llama.cpp.

    Raises:
        SourceError: No family has this architecture; the message gives the reason if it is known.
    """
    if isinstance(architecture, str) and architecture in _MODEL_TYPES:
        return _MODEL_TYPES[architecture]
    spelled = _SPELLINGS.get(architecture, architecture) if isinstance(architecture, str) else architecture
    raise SourceError(f"general.architecture: {explain_unsupported(spelled, sorted(_MODEL_TYPES))}")


assert ARCHITECTURES.keys() == FAMILIES.keys()
