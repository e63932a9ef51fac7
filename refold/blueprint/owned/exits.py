"""Tensors that only one early exit uses: its norm, its LoRA on the head and its gate, with their FLOPs."""

from collections.abc import Iterator, Mapping
from math import prod

from refold.blueprint.kinds import ZEROS, TargetTensor, norm_fill
from refold.blueprint.origins import Initialisation, Origin
from refold.blueprint.owned.kind import OwnedKind
from refold.blueprint.schema import Blueprint, Exit
from refold.families.arch import ArchSpec
from refold.mixers.spec import Fill, Shape, norm_vectors

URLS: Mapping[str, str] = {
    "exits": "https://arxiv.org/abs/2410.20672",
    "norm": "https://arxiv.org/abs/2312.04916",
    "gate": "https://arxiv.org/abs/2207.07061",
}
"""Papers on exits of tied stacks, on exits with own norms, and on learned exit gates."""


def exit_tensors(arch: ArchSpec, spec: Exit) -> dict[str, Shape]:
    """Returns name, such as `norm.weight`, and shape of the tensors of an exit, in storage order."""
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
    """Counts the parameters of an exit."""
    return sum(prod(shape) for shape in exit_tensors(arch, spec).values())


def head_flops(arch: ArchSpec, spec: Exit) -> int:
    """Counts the FLOPs of the exit's LoRA on the head, for one token that leaves at the exit."""
    return 2 * spec.head_rank * (arch.hidden_size + arch.vocab_size)


def gate_flops(arch: ArchSpec, spec: Exit) -> int:
    """Counts the FLOPs of the exit's gate for one token."""
    return 2 * arch.hidden_size if spec.gate else 0


class ExitTensors(OwnedKind):
    """Norm, head LoRA and gate of the exit behind a depth. At initialisation they equal the shared norm and head."""

    url = URLS["exits"]
    field = "exit"
    place = "exits"
    column = "exit"
    groups = frozenset({"exits"})

    def tensors(self, blueprint: Blueprint, index: int) -> Iterator[TargetTensor]:
        spec = blueprint.depths[index].exit
        if spec is not None:
            for local, shape in exit_tensors(blueprint.arch, spec).items():
                yield TargetTensor(f"model.exits.{index}.{local}", shape, self, depth=index, local=local)

    def describe(self, blueprint: Blueprint, index: int) -> str:
        spec = blueprint.depths[index].exit
        return "" if spec is None else spec.describe()

    def notes(self, blueprint: Blueprint) -> tuple[str, ...]:
        arch, places = blueprint.arch, dict[Exit, list[int]]()
        for index, depth in enumerate(blueprint.depths):
            if depth.exit is not None and depth.exit.has_parts:
                places.setdefault(depth.exit, []).append(index)
        return tuple(
            f"exits after depth {' and '.join(map(str, indices))}: {spec.describe()}, "
            f"{len(indices) * count_exit_parameters(arch, spec):,} parameters that the full depth does not use"
            for spec, indices in places.items()
        )

    def origin(self, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> Origin:
        if _is_norm(tensor):
            return Origin("fresh" if starts.weights == "fresh" else "copied", tensor.local)
        return Origin("fresh", "lm_head.weight" if tensor.local.startswith("lora.") else tensor.local)

    def fill(self, blueprint: Blueprint, tensor: TargetTensor) -> Fill:
        if _is_norm(tensor):
            return norm_fill(blueprint.arch, tensor.local)
        return Fill("normal", tensor.shape[1] ** -0.5) if tensor.local.endswith(".a") else ZEROS

    def explain(self, made: Origin, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> str:
        if made.how == "copied":
            return "the final norm"
        if tensor.local.startswith("lora."):
            return "Gaussian A, zero B: the exit begins with the shared head"
        return "zeros: the gate begins at one half" if tensor.local.startswith("gate.") else "weights: fresh"

    def line_name(self, tensor: TargetTensor) -> str:
        return tensor.name if _is_norm(tensor) else tensor.name.rpartition(".")[0] + ".*"

    def is_matrix(self, tensor: TargetTensor) -> bool:
        return len(tensor.shape) == 2

    def lost(self, blueprint: Blueprint) -> tuple[str, ...]:
        exits = [depth.exit for depth in blueprint.depths if depth.exit is not None]
        if not exits:
            return ()
        own = ", with their own norms, LoRAs and gates" if any(each.has_parts for each in exits) else ""
        return (f"a stock model has no early exits: they are dropped{own}",)


def _is_norm(tensor: TargetTensor) -> bool:
    return tensor.local.startswith("norm.")


EXIT = ExitTensors()
