"""Fresh tensors: what a target's weights are where nothing is carried over."""

import zlib

import torch
from torch import Tensor

from refold.blueprint.origins import part_of
from refold.blueprint.schema import Blueprint
from refold.blueprint.specs.part import Fill
from refold.blueprint.specs.registry import find_mixer
from refold.blueprint.tensors import TargetTensor
from refold.families.arch import ArchSpec
from refold.nn.fills import make_fill

_ZERO_AT_EXITS = ("lora.lm_head.b", "gate.weight", "gate.bias")


def tensor_seed(seed: int, name: str) -> int:
    """A seed of its own for each tensor, so that the order of writing does not matter."""
    return seed * 1_000_003 + zlib.crc32(name.encode())


def fill_of(blueprint: Blueprint, tensor: TargetTensor) -> Fill | None:
    """Returns what a mixer's spec asks for in a fresh vector; None for all other tensors."""
    if tensor.role != "vector" or tensor.pool != "mixer":
        return None
    part = blueprint.mixers[part_of(blueprint, tensor)]
    return find_mixer(part.type).fills(blueprint.arch, part.options).get(tensor.local)


def fresh_tensor(tensor: TargetTensor, arch: ArchSpec, seed: int, fill: Fill | None = None) -> Tensor:
    """Returns float32 start values.

    Normal weights and prefixes, unit norms, zero biases and gates; Gaussian A and zero B of LoRAs.

    Args:
        tensor: What is to be filled.
        arch: Gives the standard deviation and the norm's offset.
        seed: The conversion's seed.
        fill: What its mixer's spec asks for, from `fill_of`.
    """
    if fill is not None:
        # Random features estimate exp(q . k) only where queries and keys have the same directions.
        name = tensor.name.replace("q_map.", "k_map.")
        return make_fill(fill, tensor.shape, torch.Generator().manual_seed(tensor_seed(seed, name)))
    if tensor.role == "lora_b" or tensor.local in _ZERO_AT_EXITS:
        return torch.zeros(tensor.shape)
    is_exit_norm = tensor.role == "exit" and tensor.local.startswith("norm.")
    if tensor.role in ("vector", "final_norm") or is_exit_norm:
        scales = tensor.local.endswith("norm.weight")
        return torch.full(tensor.shape, 1.0 - arch.norm.offset if scales else 0.0)
    generator = torch.Generator().manual_seed(tensor_seed(seed, tensor.name))
    std = tensor.shape[1] ** -0.5 if tensor.role in ("lora_a", "exit") else arch.initializer_range
    if tensor.role == "factor_a":
        # So that the product of two fresh factors varies as a fresh matrix does.
        std = tensor.shape[0] ** -0.5
    return torch.randn(tensor.shape, generator=generator) * std
