"""Early exits: what one stores of its own, and what it costs to leave there."""

from collections.abc import Mapping

from refold.blueprint.schema import Blueprint, Exit
from refold.families.arch import ArchSpec
from refold.mixers.spec import Shape, norm_vectors

URLS: Mapping[str, str] = {
    "exits": "https://arxiv.org/abs/2410.20672",
    "norm": "https://arxiv.org/abs/2312.04916",
    "gate": "https://arxiv.org/abs/2207.07061",
}
"""Where exits of tied stacks, exits with norms of their own, and learned exit signals are described."""


def exit_tensors(arch: ArchSpec, spec: Exit) -> dict[str, Shape]:
    """Returns name, such as `norm.weight`, to shape of what an exit stores, in the order it is stored."""
    found: dict[str, Shape] = {}
    if spec.norm == "own":
        found |= norm_vectors("norm", arch.norm, arch.hidden_size)
    if spec.head_rank:
        found["lora.lm_head.a"] = (spec.head_rank, arch.hidden_size)
        found["lora.lm_head.b"] = (arch.vocab_size, spec.head_rank)
    if spec.gate:
        found |= {"gate.weight": (1, arch.hidden_size), "gate.bias": (1,)}
    return found


def count_exit_parameters(arch: ArchSpec, spec: Exit) -> int:
    """Counts the numbers an exit stores."""
    total = 0
    for shape in exit_tensors(arch, spec).values():
        size = 1
        for side in shape:
            size *= side
        total += size
    return total


def head_flops(arch: ArchSpec, spec: Exit) -> int:
    """FLOPs of the LoRA on the head for a token that leaves here."""
    return 2 * spec.head_rank * (arch.hidden_size + arch.vocab_size)


def gate_flops(arch: ArchSpec, spec: Exit) -> int:
    """FLOPs of the gate for a token that comes past."""
    return 2 * arch.hidden_size if spec.gate else 0


def describe_exits(blueprint: Blueprint) -> tuple[str, ...]:
    """Returns a line for each kind of exit with parts of its own."""
    places: dict[Exit, list[int]] = {}
    for index, depth in enumerate(blueprint.depths):
        if depth.exit is not None and depth.exit.has_parts:
            places.setdefault(depth.exit, []).append(index)
    return tuple(
        f"exits after depth {' and '.join(map(str, indices))}: {spec.describe()}, "
        f"{len(indices) * count_exit_parameters(blueprint.arch, spec):,} parameters that the full depth does not use"
        for spec, indices in places.items()
    )
