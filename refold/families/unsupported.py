"""Error messages for models of unsupported families, with the reason if it is known."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from refold.suggest import shorten

ENCODER = "an encoder: it predicts no next token, so there is nothing to fold, heal or evaluate here"
ENCODER_DECODER = "an encoder-decoder: its decoder reads an encoder, and refold folds decoder-only models"
EXPERTS = "a mixture of experts: each layer chooses among many MLPs, and refold folds layers with one MLP"
RECURRENT = "a recurrent or hybrid model: some of its layers have no softmax attention, which every source needs"
OTHER_DECODER = "a decoder whose tensor names refold does not know yet"
NOT_TEXT = "not a text-only model"
_KINDS: Mapping[str, tuple[str, ...]] = {
    ENCODER: (
        "bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "camembert",
        "mpnet", "nomic_bert", "modernbert", "esm", "longformer", "big_bird", "xlnet",
    ),
    ENCODER_DECODER: (
        "t5", "mt5", "umt5", "longt5", "bart", "mbart", "pegasus", "marian", "m2m_100", "led", "blenderbot", "whisper",
        "prophetnet", "encoder-decoder", "switch_transformers", "t5gemma",
    ),
    EXPERTS: (
        "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "deepseek_v2", "deepseek_v3", "dbrx", "gpt_oss",
        "phimoe", "granitemoe", "llama4", "llama4_text", "minimax", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe",
        "dots1", "arctic", "grok-1", "nllb-moe",
    ),
    RECURRENT: (
        "mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "jamba", "bamba", "zamba", "zamba2", "recurrent_gemma",
        "nemotron_h", "lfm2", "qwen3_next", "granitemoehybrid", "falcon_h1", "kimi_linear", "retnet", "gla",
    ),
    OTHER_DECODER: (
        "gpt2", "gpt_neo", "gptj", "opt", "bloom", "falcon", "mpt", "codegen", "gpt_bigcode", "starcoder2", "stablelm",
        "cohere", "cohere2", "olmo", "olmo3", "internlm2", "baichuan", "chatglm", "glm", "glm4", "gemma3n", "granite",
        "smollm3", "phi", "persimmon", "biogpt", "xglm", "openai-gpt", "nemotron", "exaone", "exaone4", "ministral",
        "qwen", "minicpm",
    ),
    NOT_TEXT: (
        "vit", "clip", "siglip", "dinov2", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "idefics",
        "paligemma", "blip", "wav2vec2", "hubert", "mistral3", "sam", "detr", "swin", "resnet",
    ),
}  # fmt: skip
REASONS: Mapping[str, str] = {name: reason for reason, names in _KINDS.items() for name in names}
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def explain_unsupported(model_type: object, supported: Iterable[str], config: Mapping[str, Any] | None = None) -> str:
    """Returns the message for an unsupported family: the kind of the model if known, else a similar name.

    Args:
        model_type: The value in `config.json`.
        supported: Names of the supported families.
        config: The whole of `config.json`, from which the kind of an unknown `model_type` is derived.
    """
    names = list(supported)
    said = f"must be one of {', '.join(names)} (got {shorten(model_type)}"
    reason = _reason(model_type, config or {})
    if reason is not None:
        return f"{said}, {reason}); choose a model of a family in this list"
    close = difflib.get_close_matches(str(model_type)[:100].lower(), names, n=1, cutoff=0.8)
    return f"{said})" + (f"; did you mean '{close[0]}'?" if close and isinstance(model_type, str) else "")


def _reason(model_type: object, config: Mapping[str, Any]) -> str | None:
    if isinstance(model_type, str) and model_type in REASONS:
        return REASONS[model_type]
    if config.get("is_encoder_decoder") is True:
        return ENCODER_DECODER
    if any(isinstance(config.get(key), int) and config[key] > 1 for key in _NUM_EXPERTS):
        return EXPERTS
    architectures = config.get("architectures")
    if isinstance(architectures, list) and any(str(each).endswith("ForMaskedLM") for each in architectures):
        return ENCODER
    return None
