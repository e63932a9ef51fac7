"""Writes GGUF files as llama.cpp's converter does, without refold's exporter."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ARCHITECTURES = {"mistral": "llama", "gpt_neox": "gptneox", "gemma3_text": "gemma3"}
NAMED = {
    "max_position_embeddings": "add_context_length",
    "hidden_size": "add_embedding_length",
    "num_hidden_layers": "add_block_count",
    "intermediate_size": "add_feed_forward_length",
    "num_attention_heads": "add_head_count",
    "num_key_value_heads": "add_head_count_kv",
    "head_dim": "add_key_length",
    "rms_norm_eps": "add_layer_norm_rms_eps",
    "layer_norm_eps": "add_layer_norm_eps",
    "use_parallel_residual": "add_parallel_residual",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
    "vocab_size": "add_vocab_size",
}


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleaves the halves of each head."""
    size = weight.shape[0] // heads
    rows = [
        head * size + half * size // 2 + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return weight[rows]


def by_projection(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Brings rows [heads, 3, head_dim] into the order [3, heads, head_dim]."""
    size = weight.shape[0] // heads // 3
    rows = [head * 3 * size + part * size + row for part in range(3) for head in range(heads) for row in range(size)]
    return weight[rows]


def as_converted(name: str, weight: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    kind, heads = config["model_type"], config["num_attention_heads"]
    if kind in ("llama", "mistral") and ".q_proj." in name:
        return interleave(weight, heads)
    if kind in ("llama", "mistral") and ".k_proj." in name:
        return interleave(weight, config["num_key_value_heads"])
    if kind == "gpt_neox" and ".query_key_value." in name:
        return by_projection(weight, heads)
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return weight + 1
    return weight


def rope_factors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    context, found = rope["original_max_position_embeddings"], []
    for pair in range(head_dim // 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        if wave < context / rope["high_freq_factor"]:
            found.append(1.0)
        elif wave > context / rope["low_freq_factor"]:
            found.append(rope["factor"])
        else:
            smooth = (context / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(found)


def add_rope(writer: Any, config: Mapping[str, Any], head_dim: int) -> dict[str, torch.Tensor]:
    from gguf import RopeScalingType

    v4 = {"rope_type": "default", **(config.get("rope_scaling") or {})}
    v4 |= {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if name in config}
    rope = config.get("rope_parameters") or v4
    if "rope_local_base_freq" in config:
        rope = {"full_attention": v4, "sliding_attention": {"rope_theta": config["rope_local_base_freq"]}}
    if "full_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    return {"rope_freqs.weight": rope_factors(rope, head_dim)} if rope["rope_type"] == "llama3" else {}


def add_windows(writer: Any, config: Mapping[str, Any]) -> None:
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        writer.add_sliding_window(config["sliding_window"])
        if config["model_type"] == "gemma3_text":
            writer.add_sliding_window_pattern([each == "sliding_attention" for each in config["layer_types"]])


def add_tokenizer(writer: Any, folder: Path) -> None:
    """Adds the byte-level vocabulary of `make_model`."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"] | {each["content"]: each["id"] for each in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    special = {each["content"] for each in tokenizer["added_tokens"] if each["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(ids["<s>"])
    writer.add_eos_token_id(ids["</s>"])
    writer.add_pad_token_id(ids["<pad>"])
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")


Edit = Callable[[Any], None]


def write(
    folder: Path,
    path: Path,
    types: Mapping[str, str] | None = None,
    edit: Edit | None = None,
    omit: tuple[str, ...] = (),
    split: int = 0,
) -> Path:
    """Writes the model of a transformers folder as a GGUF file.

    Args:
        folder: The folder.
        path: The file.
        types: Type by a part of a tensor's name; others are stored in 32 bits.
        edit: Changes the metadata, given the writer.
        omit: Fields of the config that are not written.
        split: Tensors of each file; 0: all in one.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text())
    kind = str(ARCHITECTURES.get(config["model_type"], config["model_type"]))
    writer = gguf.GGUFWriter(path, kind, split_max_tensors=split)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for field, add in NAMED.items():
        if config.get(field) is not None and field not in omit:
            getattr(writer, add)(config[field])
    if config.get("head_dim") is not None:
        writer.add_value_length(config["head_dim"])
    extra = add_rope(writer, config, head_dim)
    add_windows(writer, config)
    if (folder / "tokenizer.json").exists():
        add_tokenizer(writer, folder)
    if edit is not None:
        edit(writer)
    arch = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    tensors = {
        str(names.get_name(name, (".weight", ".bias"))): as_converted(name, weight.float(), config)
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    for name, weight in (tensors | extra).items():
        wanted = next((value for part, value in (types or {}).items() if part in name), "F32")
        number = gguf.GGMLQuantizationType[wanted if weight.dim() > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """Returns the function `write`; skips where the package gguf is absent."""
    pytest.importorskip("gguf", reason="the package gguf writes the files")
    return write
