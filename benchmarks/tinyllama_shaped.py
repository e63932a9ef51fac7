"""A bf16 checkpoint of TinyLlama-1.1B's shape whose layers differ like those of a trained model."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from refold.checkpoint.writer import ShardedWriter, TensorSpecs, count_bytes

NUM_SHARDS = 5
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 2048, 32, 4, 64, 5632, 32_000
RMS = 0.02
"""Root mean square of the entries of a residual, and of the mean of two tied layers; equal in every measured linear."""


@dataclass(frozen=True)
class Law:
    """Spectrum of the residual between tied layers: s(x) ~ (x + shift)^-power (1 - x)^end + floor.

    x = (i + 1/2) / n is the relative index of a singular value. The law was fitted on books-10m (12 trained layers,
    hidden 256): the root mean square over the six pairs (l, l + 6) of the singular values of (W_l - W_{l+6}) / 2, each
    scaled to unit mean square, in log s with weights x^-1/2 over the first 95%, by L-BFGS from eight starts. The error
    of the fit is 2-7% over the first 90%, and at most 0.012 of the whole for the energy in the first 1/32, 1/8 and 1/2.
    The law depends on x alone, so 64 of 2,048 singular values have the same share of energy as 8 of 256.
    """

    power: float
    shift: float
    end: float
    floor: float

    def spectrum(self, count: int) -> Tensor:
        """Returns `count` singular values, descending, of unit mean square, in float64."""
        x = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        values = (x + self.shift) ** -self.power * (1 - x) ** self.end + self.floor
        return values / values.square().mean().sqrt()


@dataclass(frozen=True)
class Linear:
    """One linear of a layer."""

    name: str
    shape: tuple[int, int]
    law: Law


LINEARS = (
    Linear("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN), Law(0.281, 0.0001, 1.051, 0.0105)),
    Linear("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN), Law(0.324, 0.0, 0.829, 0.2669)),
    Linear("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN), Law(0.895, 0.2570, 0.777, 0.2799)),
    Linear("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM), Law(0.566, 0.0813, 1.126, 0.0104)),
    Linear("mlp.gate_proj", (INTERMEDIATE, HIDDEN), Law(0.154, 0.0021, 1.459, 0.3009)),
    Linear("mlp.up_proj", (INTERMEDIATE, HIDDEN), Law(0.231, 0.0318, 1.265, 0.3318)),
    Linear("mlp.down_proj", (HIDDEN, INTERMEDIATE), Law(0.122, 0.0, 1.119, 0.2997)),
)
NORMS = ("input_layernorm", "post_attention_layernorm")
OUTSIDE = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCAB, HIDDEN),
}


def make_checkpoint(folder: Path, num_layers: int, seed: int) -> None:
    """Writes the checkpoint, two tied layers of one linear in memory at a time.

    Layers l and l + num_layers / 2, which two loops tie, are M + R and M - R: M Gaussian, R with the law's spectrum.

    Args:
        folder: Folder to make; must not exist.
        num_layers: Number of layers, even.
        seed: Seed of all weights.
    """
    assert num_layers % 2 == 0
    folder.mkdir(parents=True)
    specs = {name: (shape, torch.bfloat16) for name, shape in _shapes(num_layers).items()}
    with ShardedWriter(folder, specs, max_shard_bytes=_shard_bytes(specs)) as writer:
        for name, value in _tensors(num_layers, seed):
            writer.write(name, value.to(torch.bfloat16))
    (folder / "config.json").write_text(json.dumps(_config(num_layers), indent=2) + "\n")


def _shard_bytes(specs: TensorSpecs) -> int:
    """Returns the smallest shard size, in steps of a MiB, at which the tensors fill at most five shards."""
    sizes = [count_bytes({name: spec}) for name, spec in specs.items()]
    limit = math.ceil(sum(sizes) / NUM_SHARDS)
    while True:
        shards, filled = 1, 0
        for size in sizes:
            if filled and filled + size > limit:
                shards, filled = shards + 1, 0
            filled += size
        if shards <= NUM_SHARDS:
            return limit
        limit += 2**20


def _shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": OUTSIDE["model.embed_tokens.weight"]}
    for layer in range(num_layers):
        shapes |= {f"model.layers.{layer}.{linear.name}.weight": linear.shape for linear in LINEARS}
        shapes |= {f"model.layers.{layer}.{norm}.weight": (HIDDEN,) for norm in NORMS}
    return shapes | OUTSIDE


def _tensors(num_layers: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    half = num_layers // 2
    for layer in range(half):
        for linear in LINEARS:
            mean = torch.randn(linear.shape, generator=generator).mul_(RMS)
            residual = with_spectrum(linear, generator)
            yield f"model.layers.{layer}.{linear.name}.weight", mean + residual
            yield f"model.layers.{layer + half}.{linear.name}.weight", mean.sub_(residual)
    for name, shape in _shapes(num_layers).items():
        if len(shape) == 1:
            yield name, 1 + 0.1 * torch.randn(shape, generator=generator)
        elif name in OUTSIDE:
            yield name, torch.randn(shape, generator=generator).mul_(RMS)


def with_spectrum(linear: Linear, generator: torch.Generator) -> Tensor:
    """Returns a float32 matrix with the singular values of the law and pseudo-random singular vectors."""
    rows, columns = linear.shape
    count = min(rows, columns)
    values = linear.law.spectrum(count)
    # The mean square of a matrix's entries is the sum of its squared singular values over their number.
    scale = RMS * math.sqrt(rows * columns / count)
    matrix = torch.zeros(rows, columns)
    matrix.diagonal().copy_(values * scale)
    for _ in range(2):
        matrix = _mix_rows(matrix, generator)
        matrix = _mix_rows(matrix.T.contiguous(), generator).T.contiguous()
    return matrix


def _mix_rows(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the product with an orthogonal matrix: signs, a permutation, and then two small orthogonal factors.

    Two rounds spread every singular vector over all entries, at a hundredth of the cost of a dense rotation.
    """
    rows, columns = matrix.shape
    outer = max(factor for factor in range(1, math.isqrt(rows) + 1) if rows % factor == 0)
    inner = rows // outer
    signs = torch.randint(0, 2, (rows, 1), generator=generator) * 2 - 1
    order = torch.randperm(rows, generator=generator)
    mixed = (matrix * signs)[order].view(outer, inner * columns)
    mixed = (_orthogonal(outer, generator) @ mixed).view(outer, inner, columns)
    return torch.matmul(_orthogonal(inner, generator), mixed).reshape(rows, columns)


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator)).Q


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
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 2048,
        "num_attention_heads": HEADS,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    }
