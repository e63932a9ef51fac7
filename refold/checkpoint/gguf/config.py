"""The `config.json` of transformers, made of a GGUF file's metadata."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from refold.checkpoint.gguf.container import MetadataValue
from refold.errors import SourceError
from refold.families.llama_cpp import ROPE_FACTORS, find_model_type, tensor_name
from refold.families.registry import FAMILIES
from refold.families.unsupported import EXPERTS
from refold.suggest import must_be_one_of, shorten

NOT_MODELS = {
    "adapter": "a LoRA adapter; merge it into its base model, and give that model",
    "mmproj": "the projector of a vision or audio model; give the GGUF file of the language model",
    "imatrix": "an importance matrix for quantisation; give the GGUF file of the model",
    "vocab": "a vocabulary without weights; give the GGUF file of the model",
}
"""Kinds of GGUF files (`general.type`) that hold no language model."""
IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
"""Name of the special tokens in metadata, by name in configs."""
GEMMA_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, which alone scale queries by hidden size and heads. No key says so; llama.cpp, too, tells
these models by their number of layers."""
BIAS = "attn_output.bias"


class MetadataKeys:
    """Metadata of one file, read by the names that llama.cpp uses.

    Args:
        where: The file, for messages.
        metadata: Its metadata.
    """

    def __init__(self, where: str, metadata: Mapping[str, MetadataValue]):
        self._where, self._metadata = where, metadata
        self._prefix = ""

    def read_model_type(self) -> str:
        """Returns the family, and reads further keys as those of its architecture.

        Raises:
            SourceError: The file holds no language model, or one of another architecture.
        """
        kind, architecture = self._metadata.get("general.type"), self._metadata.get("general.architecture")
        if architecture == "clip":
            kind = "mmproj"
        if isinstance(kind, str) and kind in NOT_MODELS:
            what, _, mend = NOT_MODELS[kind].partition("; ")
            raise SourceError(f"{self._where}: a language model is required (got {what}); {mend}")
        if architecture is None:
            raise SourceError(f"{self._where}: metadata general.architecture is required (not there); convert it again")
        try:
            model_type = find_model_type(architecture)
        except SourceError as error:
            raise SourceError(f"{self._where}: {error}") from None
        self._prefix = f"{architecture}."
        return model_type

    def count(self, key: str, default: int | None = None) -> int:
        """Returns a whole number from 0. A list must have the same number for each layer."""
        value = self._get(key, default)
        if isinstance(value, tuple) and value:
            if len(set(value)) > 1:
                raise SourceError(
                    f"{self._where}: metadata {self._prefix}{key}: one number for all layers is required (got "
                    f"{shorten(list(value))}); refold folds models whose layers have one shape"
                )
            value = value[0]
        if type(value) is not int or value < 0:
            raise self.wrong(key, "a whole number from 0", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a finite number."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(key, "a finite number", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Returns a truth value."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false", value)
        return value

    def text(self, key: str, default: str) -> str:
        """Returns a text."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a text", value)
        return value

    def has(self, key: str) -> bool:
        """Tells whether the file has a key of its architecture."""
        return self._prefix + key in self._metadata

    def pattern(self, key: str, num_layers: int, period: int) -> list[bool]:
        """Returns for each layer whether it has a window, from a list or from the period of layers without one."""
        value = self._metadata.get(self._prefix + key, period)
        if type(value) is int and value >= 0:
            # A period of 0 means that every layer has a window.
            return [value == 0 or layer % value < value - 1 for layer in range(num_layers)]
        if isinstance(value, tuple) and len(value) == num_layers and all(type(each) in (bool, int) for each in value):
            return [bool(each) for each in value]
        raise self.wrong(key, f"a period, or a list of {num_layers} truth values", value)

    def token_ids(self, vocab_size: int) -> dict[str, int | None]:
        """Returns the ids of the special tokens; None for those that the file does not have."""
        found = {name: self._metadata.get(f"tokenizer.ggml.{ours}_token_id") for name, ours in IDS.items()}
        return {
            name: value if type(value) is int and 0 <= value < vocab_size else None for name, value in found.items()
        }

    def wrong(self, key: str, requirement: str, value: object) -> SourceError:
        """Returns the error for a value that does not fit."""
        return SourceError(
            f"{self._where}: metadata {self._prefix}{key}: {requirement} is required (got {shorten(value)}); convert "
            f"the model again"
        )

    def _get(self, key: str, default: Any) -> Any:
        name = self._prefix + key
        if name not in self._metadata and default is None:
            raise SourceError(f"{self._where}: metadata {name} is required (not there); convert the model again")
        return self._metadata.get(name, default)


def make_config(
    where: str,
    metadata: Mapping[str, MetadataValue],
    shapes: Mapping[str, tuple[int, ...]],
    find_scaling: Callable[[float], dict[str, Any]],
) -> dict[str, Any]:
    """Makes a `config.json` of transformers 5.

    Args:
        where: The file, for messages.
        metadata: Its metadata.
        shapes: Shapes of its tensors, by their names in the file.
        find_scaling: Returns the scaling that the stored rope factors describe, for a base; called if there are any.

    Raises:
        SourceError: The file holds no model of a supported architecture, or a key is missing or has the wrong type.
    """
    keys = MetadataKeys(where, metadata)
    model_type = keys.read_model_type()
    if keys.count("expert_count", 0) > 0:
        raise SourceError(f"{where}: one MLP in each layer is required (got {EXPERTS}); choose another model")
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise SourceError(f"{where}: tensor token_embd.weight is required (not there); give the GGUF file of a model")
    config = _decoder(keys, embedding[0], tied="output.weight" not in shapes)
    if model_type == "llama" and keys.count("attention.sliding_window", 0):
        model_type = "mistral"
    config["model_type"] = model_type
    config["architectures"] = [FAMILIES[model_type].architecture]
    config["rope_parameters"] = _rope(keys, config, lambda theta: find_scaling(theta) if ROPE_FACTORS in shapes else {})
    _OWN[model_type](keys, config, shapes)
    return config


def _decoder(keys: MetadataKeys, vocab_size: int, tied: bool) -> dict[str, Any]:
    """Returns the fields that all families have."""
    hidden_size, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    if not heads:
        raise keys.wrong("attention.head_count", "a positive number", heads)
    head_dim = keys.count("attention.key_length", hidden_size // heads)
    if (value_dim := keys.count("attention.value_length", head_dim)) != head_dim:
        raise keys.wrong("attention.value_length", f"{head_dim}, the length of keys,", value_dim)
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "tie_word_embeddings": tied,
        **keys.token_ids(vocab_size),
    }


def _rope(
    keys: MetadataKeys, config: Mapping[str, Any], find_scaling: Callable[[float], dict[str, Any]]
) -> dict[str, Any]:
    """Returns the `rope_parameters`: base, scaling and rotated share."""
    theta, head_dim = keys.number("rope.freq_base", 10000.0), config["head_dim"]
    scaling = find_scaling(theta) or _scaling(keys, config)
    rotated = keys.count("rope.dimension_count", head_dim)
    share = {} if rotated == head_dim else {"partial_rotary_factor": _share(keys, rotated, head_dim)}
    if share and config["model_type"] not in ("phi3", "gpt_neox"):
        raise keys.wrong("rope.dimension_count", f"{head_dim}, the size of a head,", rotated)
    return {"rope_type": "default", "rope_theta": theta, **scaling, **share}


def _share(keys: MetadataKeys, rotated: int, head_dim: int) -> float:
    if not 0 < rotated <= head_dim:
        raise keys.wrong("rope.dimension_count", f"a number from 1 to {head_dim}", rotated)
    share = rotated / head_dim
    return share if int(head_dim * share) == rotated else math.nextafter(share, 1.0)


def _scaling(keys: MetadataKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    # Without a type llama.cpp scales linearly.
    kind = keys.text("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        given = {
            ours: keys.number(theirs)
            for ours, theirs in {
                "beta_fast": "rope.scaling.yarn_beta_fast",
                "beta_slow": "rope.scaling.yarn_beta_slow",
            }.items()
            if keys.has(theirs)
        }
        if keys.has("rope.scaling.attn_factor"):
            # llama.cpp multiplies it by the factor that transformers computes if the config has none.
            usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
            given["attention_factor"] = keys.number("rope.scaling.attn_factor") * usual
        original = keys.count("rope.scaling.original_context_length", config["max_position_embeddings"])
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **given}
    if kind == "longrope":
        return {"rope_type": "longrope"}
    raise keys.wrong("rope.scaling.type", must_be_one_of(kind, ("none", "linear", "yarn")), kind)


def _own_rms(keys: MetadataKeys, config: dict[str, Any]) -> None:
    config["rms_norm_eps"] = keys.number("attention.layer_norm_rms_epsilon")


def _own_llama(keys: MetadataKeys, config: dict[str, Any], shapes: Collection[str]) -> None:
    _own_rms(keys, config)
    config["hidden_act"] = "silu"
    config["attention_bias"] = tensor_name(["mixer.q_proj.bias"], 0) in shapes
    if config["model_type"] == "llama":
        config["mlp_bias"] = tensor_name(["mlp.up_proj.bias"], 0) in shapes
    if config["model_type"] == "mistral":
        config["sliding_window"] = keys.count("attention.sliding_window")


def _own_qwen(keys: MetadataKeys, config: dict[str, Any], shapes: Collection[str]) -> None:
    _own_rms(keys, config)
    config |= {"hidden_act": "silu", "use_sliding_window": False}
    if config["model_type"] == "qwen3":
        config["attention_bias"] = tensor_name(["mixer.q_proj.bias"], 0) in shapes


def _own_gemma(keys: MetadataKeys, config: dict[str, Any], shapes: Collection[str]) -> None:
    _own_rms(keys, config)
    name = "hidden_act" if config["model_type"] == "gemma" else "hidden_activation"
    config[name] = "gelu_pytorch_tanh"
    config["attention_bias"] = tensor_name(["mixer.q_proj.bias"], 0) in shapes


def _own_gemma2(keys: MetadataKeys, config: dict[str, Any], shapes: Collection[str]) -> None:
    _own_gemma(keys, config, shapes)
    config["attn_logit_softcapping"] = keys.number("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = keys.number("final_logit_softcapping", 30.0)
    _own_windows(keys, config, keys.count("attention.sliding_window", 4096), period=2)
    _own_scale(config, "gemma2")


def _own_gemma3(keys: MetadataKeys, config: dict[str, Any], shapes: Collection[str]) -> None:
    _own_gemma(keys, config, shapes)
    cap = keys.number("final_logit_softcapping", 0.0)
    config["final_logit_softcapping"] = cap or None
    _own_windows(keys, config, keys.count("attention.sliding_window", 0), period=6)
    _own_scale(config, "gemma3")
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}


def _own_windows(keys: MetadataKeys, config: dict[str, Any], window: int, period: int) -> None:
    num_layers = config["num_hidden_layers"]
    slides = keys.pattern("attention.sliding_window_pattern", num_layers, period) if window else [False] * num_layers
    config["layer_types"] = ["sliding_attention" if each else "full_attention" for each in slides]
    config["sliding_window"] = window or None


def _own_scale(config: dict[str, Any], architecture: str) -> None:
    by_width = config["num_hidden_layers"] == GEMMA_SCALED_BY_WIDTH[architecture]
    by_heads = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = by_heads if by_width else config["head_dim"]


def _own_olmo2(keys: MetadataKeys, config: dict[str, Any], shapes: Collection[str]) -> None:
    _own_llama(keys, config, shapes)
    if keys.count("attention.sliding_window", 0):
        raise keys.wrong("attention.sliding_window", "a model of OLMo 2, without a window,", "a window, as OLMo 3 has")


def _own_phi3(keys: MetadataKeys, config: dict[str, Any], shapes: Collection[str]) -> None:
    _own_rms(keys, config)
    original = keys.count("rope.scaling.original_context_length", config["max_position_embeddings"])
    config |= {
        "hidden_act": "silu",
        "sliding_window": keys.count("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": original,
    }
    if "rope_factors_long.weight" in shapes:
        config["rope_parameters"]["rope_type"] = "longrope"


def _own_gpt_neox(keys: MetadataKeys, config: dict[str, Any], shapes: Collection[str]) -> None:
    del config["num_key_value_heads"], config["head_dim"]
    config |= {
        "hidden_act": "gelu",
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon"),
        "use_parallel_residual": keys.flag("use_parallel_residual", True),
        "attention_bias": f"blk.0.{BIAS}" in shapes,
    }
    # The default of NeoX is a quarter of a head, so the share is always written.
    config["rope_parameters"].setdefault("partial_rotary_factor", 1.0)


_OWN: Mapping[str, Callable[[MetadataKeys, dict[str, Any], Collection[str]], None]] = {
    "llama": _own_llama,
    "mistral": _own_llama,
    "qwen2": _own_qwen,
    "qwen3": _own_qwen,
    "gemma": _own_gemma,
    "gemma2": _own_gemma2,
    "gemma3_text": _own_gemma3,
    "olmo2": _own_olmo2,
    "phi3": _own_phi3,
    "gpt_neox": _own_gpt_neox,
}
"""Functions that add the fields of one family."""
