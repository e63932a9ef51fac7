"""Every tensor of a folded model, by name: what the cost counts, the converter writes and the model loads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from refold.blueprint.schema import Blueprint, Pool
from refold.blueprint.specs.exits import exit_tensors
from refold.blueprint.specs.part import PartSpec, Shape, norm_vectors
from refold.blueprint.specs.registry import MLP, depth_linears, find_mixer

Role = Literal[
    "embedding", "head", "final_norm", "linear", "factor_a", "factor_b", "vector", "lora_a", "lora_b", "exit"
]


@dataclass(frozen=True)
class TargetTensor:
    """One tensor of the target.

    Attributes:
        name: As in the model folder, such as `model.mixers.0.q_proj.weight`.
        shape: Its shape.
        role: What it is for.
        pool: `mixer` or `mlp` for tensors of a part and for what a depth keeps of its own.
        part: Index of the stored part; None for what a depth owns.
        depth: Index of the depth that owns it; None for what is stored in a part or outside the stack.
        local: Name inside its part, such as `q_proj.weight` or `input_norm.weight`; of LoRA the linear's, `q_proj`;
            of what an exit has of its own as `exit_tensors` names it, such as `lora.lm_head.a`.
    """

    name: str
    shape: Shape
    role: Role
    pool: Literal["mixer", "mlp"] | None = None
    part: int | None = None
    depth: int | None = None
    local: str = ""

    @property
    def linear(self) -> str:
        """The linear that a tensor of role `linear`, `factor_*` or `lora_*` belongs to, such as `q_proj`."""
        return self.local.split(".")[0]

    @property
    def num_elements(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


def _pools(blueprint: Blueprint) -> Iterator[tuple[Pool, int, PartSpec, dict[str, Any], Mapping[str, int]]]:
    for index, part in enumerate(blueprint.mixers):
        yield "mixer", index, find_mixer(part.type), part.options, part.factors
    for index, part in enumerate(blueprint.mlps):
        yield "mlp", index, MLP, {}, part.factors


def _stored_linear(
    prefix: str, linear: str, shape: tuple[int, int], pool: Pool, part: int, rank: int | None
) -> Iterator[TargetTensor]:
    """A matrix, or two factors of a rank, or with rank 0 nothing."""
    rows, columns = shape
    if rank is None:
        local = f"{linear}.weight"
        yield TargetTensor(f"{prefix}.{local}", shape, "linear", pool, part=part, local=local)
    elif rank > 0:
        for name, role, each in (("a", "factor_a", (rank, columns)), ("b", "factor_b", (rows, rank))):
            local = f"{linear}.{name}.weight"
            yield TargetTensor(f"{prefix}.{local}", each, role, pool, part=part, local=local)


def target_tensors(blueprint: Blueprint) -> Iterator[TargetTensor]:
    """Yields every tensor of the target once, in the order it is stored.

    That is: embedding, parts, depths, exits, final norm, head.
    """
    arch = blueprint.arch
    yield TargetTensor("model.embed_tokens.weight", (arch.vocab_size, arch.hidden_size), "embedding")
    for pool, index, spec, options, factors in _pools(blueprint):
        prefix = f"model.{pool}s.{index}"
        if blueprint.keeps_vectors(pool, index):
            for local, shape in spec.vectors(arch, options).items():
                yield TargetTensor(f"{prefix}.{local}", shape, "vector", pool, part=index, local=local)
        for linear, shape in spec.linears(arch, options).items():
            yield from _stored_linear(prefix, linear, shape, pool, index, factors.get(linear))
    for index in range(blueprint.num_depths):
        yield from _depth_tensors(blueprint, index)
    for index, depth in enumerate(blueprint.depths):
        if depth.exit is not None:
            for local, shape in exit_tensors(arch, depth.exit).items():
                yield TargetTensor(f"model.exits.{index}.{local}", shape, "exit", depth=index, local=local)
    for local, shape in norm_vectors("norm", arch.norm, arch.hidden_size).items():
        yield TargetTensor(f"model.{local}", shape, "final_norm", local=local)
    if not arch.tied_head:
        yield TargetTensor("lm_head.weight", (arch.vocab_size, arch.hidden_size), "head", local="lm_head.weight")


def _depth_tensors(blueprint: Blueprint, index: int) -> Iterator[TargetTensor]:
    arch, depth = blueprint.arch, blueprint.depths[index]
    prefix = f"model.depths.{index}"
    mixer = None if depth.mixer is None else blueprint.mixers[depth.mixer]
    mixer_spec = None if mixer is None else find_mixer(mixer.type)
    if depth.vectors == "own":
        if mixer is not None and mixer_spec is not None:
            for local, shape in mixer_spec.vectors(arch, mixer.options).items():
                yield TargetTensor(
                    f"{prefix}.vectors.mixer.{local}", shape, "vector", "mixer", depth=index, local=local
                )
        if depth.mlp is not None:
            for local, shape in MLP.vectors(arch, {}).items():
                yield TargetTensor(f"{prefix}.vectors.mlp.{local}", shape, "vector", "mlp", depth=index, local=local)
    mixer_linears = {} if mixer is None or mixer_spec is None else mixer_spec.linears(arch, mixer.options)
    for linear, (rows, columns) in depth_linears(blueprint, depth).items():
        rank = depth.ranks.get(linear)
        if rank is not None:
            pool: Literal["mixer", "mlp"] = "mixer" if linear in mixer_linears else "mlp"
            name = f"{prefix}.lora.{linear}"
            yield TargetTensor(f"{name}.a", (rank, columns), "lora_a", pool, depth=index, local=linear)
            yield TargetTensor(f"{name}.b", (rows, rank), "lora_b", pool, depth=index, local=linear)
