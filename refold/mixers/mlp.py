"""The MLP: gated (SwiGLU and its like) or plain."""

from collections.abc import Mapping
from typing import Any

from refold.families.arch import ArchSpec
from refold.mixers.spec import PartSpec, Shape, outer_norms


def linears(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    up = (arch.intermediate_size, arch.hidden_size)
    return {
        **({"gate_proj": up} if arch.gated_mlp else {}),
        "up_proj": up,
        "down_proj": (arch.hidden_size, arch.intermediate_size),
    }


def vectors(arch: ArchSpec, options: Mapping[str, Any]) -> dict[str, Shape]:
    shapes = linears(arch, options)
    found = outer_norms(arch)
    if arch.mlp_bias:
        found |= {f"{name}.bias": (shape[0],) for name, shape in shapes.items()}
    return found


SPEC = PartSpec(name="mlp", url="https://arxiv.org/abs/2002.05202", linears=linears, vectors=vectors)
