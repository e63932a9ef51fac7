"""Every tensor of a folded model, by name: what each part and depth holds, in the order it is stored."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from refold.blueprint.exits import exit_tensors
from refold.blueprint.schema import POOLS, Blueprint, Pool
from refold.mixers.mlp import MLP
from refold.mixers.spec import PartSpec, Shape, norm_vectors

Linears = dict[str, tuple[int, int]]
"""Linear name to `(out, in)`."""


def part_linears(blueprint: Blueprint, pool: Pool, part: int) -> Linears:
    """Returns the linears a stored part holds, without those that none of its depths runs."""
    spec = part_spec(blueprint, pool, part)
    unused = unused_names(blueprint, pool, part)
    return {name: shape for name, shape in spec.linears(blueprint.arch).items() if name not in unused}


def part_vectors(blueprint: Blueprint, pool: Pool, part: int) -> dict[str, Shape]:
    """Returns the norms and biases of a stored part, wherever they are kept, without those that no depth uses."""
    spec = part_spec(blueprint, pool, part)
    return _without(spec.vectors(blueprint.arch), unused_names(blueprint, pool, part))


def depth_linears(blueprint: Blueprint, index: int) -> Linears:
    """Returns every linear a depth runs. Names of mixer and MLP linears never meet."""
    depth = blueprint.depths[index]
    found: Linears = {}
    if depth.mixer is not None:
        spec = part_spec(blueprint, "mixer", depth.mixer)
        idle = idle_names(blueprint, index)
        found |= {name: shape for name, shape in spec.linears(blueprint.arch).items() if name not in idle}
    if depth.mlp is not None:
        found |= MLP.linears(blueprint.arch)
    return found


def depth_factors(blueprint: Blueprint, index: int) -> dict[str, int]:
    """Returns the rank of each linear a depth runs as two factors, wherever those are kept."""
    depth = blueprint.depths[index]
    mixer = {} if depth.mixer is None else blueprint.mixers[depth.mixer].factors
    mlp = {} if depth.mlp is None else blueprint.mlps[depth.mlp].factors
    return {**mixer, **mlp, **depth_coefficients(blueprint, index)}


def depth_coefficients(blueprint: Blueprint, index: int) -> dict[str, int]:
    """Returns the rank of each linear a depth runs of which only a basis is stored, the coefficients being its own."""
    depth = blueprint.depths[index]
    mixer = {} if depth.mixer is None else blueprint.mixers[depth.mixer].bases
    bases = {**mixer, **({} if depth.mlp is None else blueprint.mlps[depth.mlp].bases)}
    run = depth_linears(blueprint, index) if bases else {}
    return {name: rank for name, rank in bases.items() if name in run}


def depth_vectors(blueprint: Blueprint, index: int, pool: Pool) -> dict[str, Shape]:
    """Returns the norms and biases a depth uses of its mixer, or of its MLP."""
    depth = blueprint.depths[index]
    part = getattr(depth, pool)
    if part is None:
        return {}
    spec = part_spec(blueprint, pool, part)
    return _without(spec.vectors(blueprint.arch), idle_names(blueprint, index) if pool == "mixer" else ())


def unused_names(blueprint: Blueprint, pool: Pool, part: int) -> frozenset[str]:
    """Returns the linears and norms of a stored part that none of its depths runs, so that they are not stored."""
    if pool == "mlp":
        return frozenset()
    idle = [idle_names(blueprint, user) for user in blueprint.users("mixer", part)]
    return frozenset.intersection(*idle)


def users_of(blueprint: Blueprint, pool: Pool, part: int, name: str) -> tuple[int, ...]:
    """Returns the depths that use one linear, norm or bias of a stored part, top to bottom.

    Args:
        blueprint: The stack.
        pool: Of the part.
        part: Its index.
        name: As in the part, such as `k_proj.weight`.
    """
    owner = name.split(".", 1)[0]
    users = blueprint.users(pool, part)
    return users if pool == "mlp" else tuple(user for user in users if owner not in idle_names(blueprint, user))


def part_spec(blueprint: Blueprint, pool: Pool, part: int) -> PartSpec:
    """Returns the typed object of a stored part: its mixer, or the MLP."""
    return MLP if pool == "mlp" else blueprint.mixers[part].mixer


def idle_names(blueprint: Blueprint, index: int) -> frozenset[str]:
    """Returns the linears and norms of its mixer that a depth does not run, because it makes no keys and values."""
    mixer = blueprint.depths[index].mixer
    if mixer is None or blueprint.made_heads(index):
        return frozenset()
    return blueprint.mixers[mixer].mixer.key_value_names


def _without(vectors: Mapping[str, Shape], owners: frozenset[str] | tuple[()]) -> dict[str, Shape]:
    return {name: shape for name, shape in vectors.items() if name.split(".", 1)[0] not in owners}


Role = Literal[
    "embedding",
    "head",
    "final_norm",
    "linear",
    "factor_a",
    "factor_b",
    "coefficients",
    "vector",
    "lora_a",
    "lora_b",
    "prefix",
    "exit",
]
ADAPTER_ROLES = frozenset[Role]({"lora_a", "lora_b", "prefix"})
"""What relaxes a tied part at one depth."""


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
        local: Name inside its part, such as `q_proj.weight` or `input_norm.weight`; of LoRA and coefficients the
            linear's, `q_proj`; of what an exit has of its own as `exit_tensors` names it, such as `lora.lm_head.a`.
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
        """The linear that a tensor of role `linear`, `factor_*`, `coefficients` or `lora_*` belongs to: `q_proj`."""
        return self.local.split(".")[0]

    @property
    def num_elements(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


def target_tensors(blueprint: Blueprint) -> Iterator[TargetTensor]:
    """Yields every tensor of the target once, in the order it is stored.

    That is: embedding, parts, depths, exits, final norm, head.
    """
    arch = blueprint.arch
    yield TargetTensor("model.embed_tokens.weight", (arch.vocab_size, arch.hidden_size), "embedding")
    for pool in POOLS:
        for index in range(len(blueprint.pool(pool))):
            yield from _part_tensors(blueprint, pool, index)
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


def _part_tensors(blueprint: Blueprint, pool: Pool, index: int) -> Iterator[TargetTensor]:
    prefix, stored = f"model.{pool}s.{index}", blueprint.pool(pool)[index]
    if blueprint.keeps_vectors(pool, index):
        for local, shape in part_vectors(blueprint, pool, index).items():
            yield TargetTensor(f"{prefix}.{local}", shape, "vector", pool, part=index, local=local)
    for linear, shape in part_linears(blueprint, pool, index).items():
        if linear in stored.bases:
            local, basis = f"{linear}.a.weight", (stored.bases[linear], shape[1])
            yield TargetTensor(f"{prefix}.{local}", basis, "factor_a", pool, part=index, local=local)
        else:
            yield from _stored_linear(prefix, linear, shape, pool, index, stored.factors.get(linear))


def _stored_linear(
    prefix: str, linear: str, shape: tuple[int, int], pool: Pool, part: int, rank: int | None
) -> Iterator[TargetTensor]:
    """A matrix, or two factors of a rank, or with rank 0 nothing."""
    rows, columns = shape
    if rank is None:
        local = f"{linear}.weight"
        yield TargetTensor(f"{prefix}.{local}", shape, "linear", pool, part=part, local=local)
    elif rank > 0:
        factors: tuple[tuple[str, Role, Shape], ...] = (
            ("a", "factor_a", (rank, columns)),
            ("b", "factor_b", (rows, rank)),
        )
        for name, role, each in factors:
            local = f"{linear}.{name}.weight"
            yield TargetTensor(f"{prefix}.{local}", each, role, pool, part=part, local=local)


def _depth_tensors(blueprint: Blueprint, index: int) -> Iterator[TargetTensor]:
    depth = blueprint.depths[index]
    prefix = f"model.depths.{index}"
    if depth.vectors == "own":
        for pool in POOLS:
            for local, shape in depth_vectors(blueprint, index, pool).items():
                yield TargetTensor(f"{prefix}.vectors.{pool}.{local}", shape, "vector", pool, depth=index, local=local)
    if depth.prefix:
        shape = (depth.prefix, blueprint.arch.hidden_size)
        yield TargetTensor(f"{prefix}.prefix", shape, "prefix", "mixer", depth=index, local="prefix")
    of_mixer = {} if depth.mixer is None else part_linears(blueprint, "mixer", depth.mixer)
    coefficients = depth_coefficients(blueprint, index)
    for linear, (rows, columns) in depth_linears(blueprint, index).items():
        pool: Pool = "mixer" if linear in of_mixer else "mlp"
        if linear in coefficients:
            name, shape = f"{prefix}.coefficients.{linear}", (rows, coefficients[linear])
            yield TargetTensor(name, shape, "coefficients", pool, depth=index, local=linear)
        rank = depth.ranks.get(linear)
        if rank is not None:
            name = f"{prefix}.lora.{linear}"
            yield TargetTensor(f"{name}.a", (rank, columns), "lora_a", pool, depth=index, local=linear)
            yield TargetTensor(f"{name}.b", (rows, rank), "lora_b", pool, depth=index, local=linear)
