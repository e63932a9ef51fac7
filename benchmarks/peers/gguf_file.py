"""Writes a GGUF file of a Llama folder, in float32, bfloat16, Q8_0 or Q4_0.

    PEER/bin/python benchmarks/peers/gguf_file.py MODEL OUT.gguf Q4_0

The environment needs `gguf`, `numpy` and `safetensors`. The embedding of a quantised file is quantised too; norms are
float32.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray
from source_tensors import read_tensors

TYPES = {name: GGMLQuantizationType[name] for name in ("F32", "BF16", "Q8_0", "Q4_0")}
FILE_TYPES = {"F32": 0, "BF16": 32, "Q8_0": 7, "Q4_0": 2}
"""`llama_ftype` of each."""
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, out: Path, kind: str) -> None:
    """Writes the file.

    Args:
        folder: Llama model in float32 or bfloat16, in one or several safetensors files.
        out: File to write.
        kind: `F32`, `BF16`, `Q8_0` or `Q4_0`.
    """
    config = json.loads((folder / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    part = out.with_suffix(".part")
    writer = GGUFWriter(part, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[kind])
    _add_vocabulary(writer, config["vocab_size"])
    for name, weight in read_tensors(folder).items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _interleave(weight, heads if "q_proj" in name else groups)
        target = _rename(name)
        if weight.ndim == 1 or kind == "F32":
            writer.add_tensor(target, weight)
        else:
            writer.add_tensor(target, quants.quantize(weight, TYPES[kind]), raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(out)


def _rope_theta(config: dict) -> float:
    return float((config.get("rope_parameters") or config).get("rope_theta", 10_000.0))


def _interleave(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorders the rows of each head: transformers rotates halves, llama.cpp's `llama` neighbours."""
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, width)


def _rename(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def _add_vocabulary(writer: GGUFWriter, size: int) -> None:
    """Adds placeholders: requests are token ids, so no text is tokenised."""
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    tokens += [f"token{index}".encode() for index in range(len(tokens), size)]
    # Token types of llama.cpp: 1 normal, 2 unknown, 3 control, 6 byte.
    kinds = [2, 3, 3, *[6] * 256, *[1] * (size - 259)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens[:size])
    writer.add_token_scores([-float(index) for index in range(size)])
    writer.add_token_types(kinds[:size])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
