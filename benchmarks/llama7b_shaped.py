"""A sharded bf16 checkpoint of Llama-7B's shape with random weights and any number of layers."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from refold.checkpoint.writer import ShardedWriter
from refold.studies.shipped import shipped_model

HIDDEN, INTERMEDIATE, HEADS, VOCAB = 4096, 11_008, 32, 32_000
SHARD_BYTES = 2 * 10**9
STD = 0.02
SQUARE, UP, DOWN = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
LAYER = {
    **{f"self_attn.{name}_proj.weight": SQUARE for name in "qkvo"},
    "mlp.gate_proj.weight": UP,
    "mlp.up_proj.weight": UP,
    "mlp.down_proj.weight": DOWN,
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}


def make_checkpoint(folder: Path, num_layers: int, seed: int) -> None:
    """Writes the checkpoint, with the tokenizer of the model that ships with refold (its ids are below 32,000).

    Every matrix is a slice of the same Gaussian numbers with another offset, because drawing all would take minutes.

    Args:
        folder: Folder to make; must not exist.
        num_layers: Number of layers, of about 400 MB each.
        seed: Seed of all weights.
    """
    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in LAYER.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(VOCAB * HIDDEN, generator=generator).mul_(STD).bfloat16()
    specs = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    with ShardedWriter(folder, specs, max_shard_bytes=SHARD_BYTES) as writer:
        for name, shape in shapes.items():
            begin = int(torch.randint(numbers.numel(), (1,), generator=generator))
            writer.write(
                name, torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else _part(numbers, begin, shape)
            )
    (folder / "config.json").write_text(json.dumps(_config(num_layers), indent=2) + "\n")
    for file in shipped_model().glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def _part(numbers: Tensor, begin: int, shape: tuple[int, ...]) -> Tensor:
    rows, columns = shape
    return torch.cat((numbers[begin:], numbers[:begin]))[: rows * columns].view(shape)


def _config(num_layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": STD,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 2048,
        "num_attention_heads": HEADS,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    }
