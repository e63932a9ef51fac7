"""The blueprint: the stored parts, the stack that runs them, and the tensors of each part and depth."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from refold.blueprint.former import read_part, read_stack
from refold.blueprint.integers import SchemeName
from refold.blueprint.part_sizes import narrow_heads, narrow_mlp, require_all_heads, require_sizes
from refold.errors import RecipeError
from refold.families.arch import ArchSpec, Frozen, Rope, Size
from refold.mixers.attention import Attention
from refold.mixers.registry import AnyMixer
from refold.mixers.spec import MLP, PartSpec, Shape

Index = Annotated[int, Field(ge=0)]
Rank = Annotated[int, Field(gt=0)]
Pool = Literal["mixer", "mlp"]
POOLS: tuple[Pool, ...] = ("mixer", "mlp")


class Part(Frozen):
    """A stored part: weights that one or more depths use."""

    sources: tuple[Index, ...] = ()
    """Source layers that the part is computed from; empty: fresh weights."""
    factors: dict[str, Index] = Field(default_factory=dict)
    """Rank of each linear that is stored as two factors instead of a matrix. 0: the part stores nothing of the linear,
    and the LoRAs of the depths replace it."""
    bases: dict[str, Rank] = Field(default_factory=dict)
    """Rank of each linear of which the part stores only a basis A `[rank, in]`. Each depth has its own coefficients B
    `[out, rank]` and computes B (A x) (Basis Sharing, arXiv 2410.03765)."""
    quantised: dict[str, SchemeName] = Field(default_factory=dict)
    """Scheme of each linear whose weight, factors or basis are stored as integers."""

    def narrow(self, arch: ArchSpec) -> ArchSpec:
        """Returns an architecture with the sizes of the part, which may be narrower."""
        return arch


class MixerPart(Part):
    """A stored token mixer with its norms."""

    mixer: AnyMixer = Attention()
    """The mixer, with options resolved against the source."""
    num_key_value_heads: Size | None = None
    """Number of key-value heads, each with all query heads that read it; None: as in the source."""

    def narrow(self, arch: ArchSpec) -> ArchSpec:
        return narrow_heads(arch, self.num_key_value_heads)

    @model_validator(mode="before")
    @classmethod
    def _former(cls, value: Any) -> Any:
        return read_part(value)


class MlpPart(Part):
    """A stored MLP with its norms."""

    intermediate_size: Size | None = None
    """Number of neurons; None: as in the source."""

    def narrow(self, arch: ArchSpec) -> ArchSpec:
        return narrow_mlp(arch, self.intermediate_size)


class Exit(Frozen):
    """An early exit behind a depth: a norm, then the head that all depths share.

    `refold.blueprint.owned.exits` lists the tensors that only an exit uses.
    """

    norm: Literal["shared", "own"] = "shared"
    """The norm of the exit: the final norm (`shared`), or a norm that only this exit uses (`own`)."""
    head_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the LoRA on the shared head that only this exit uses; 0: no LoRA."""
    gate: bool = False
    """Whether the exit has a gate: a small linear that predicts if the exit and the full depth agree on the token."""

    @property
    def has_parts(self) -> bool:
        """Whether any tensor is stored for this exit alone."""
        return self.norm == "own" or self.head_rank > 0 or self.gate

    def describe(self) -> str:
        """Returns the exit's own parts in words, such as `own norm, head rank 8, gate`; `shared` without any."""
        parts = (self.norm == "own", "own norm"), (self.head_rank, f"head rank {self.head_rank}"), (self.gate, "gate")
        return ", ".join(name for there, name in parts if there) or "shared"


class KvRead(Frozen):
    """Key-value heads whose keys and values a depth reads from an earlier depth."""

    depth: Index
    """The earlier depth that computes keys and values from its own input, with its own weights, norm and rotation."""
    heads: Annotated[tuple[Index, ...], Field(min_length=1)]
    """Indices of the heads, which are the same at both depths."""

    def describe(self, num_heads: int) -> str:
        """Returns the earlier depth in words, such as `3`, or `3 (heads 0, 1)` for fewer than `num_heads` heads."""
        listed = ", ".join(map(str, self.heads))
        return f"{self.depth}" if len(self.heads) == num_heads else f"{self.depth} (heads {listed})"


class DepthSpec(Frozen):
    """One executed layer."""

    source: Index
    """The source layer that the depth replaces."""
    mixer: Index | None
    """Index of the stored mixer that the depth runs; None: dropped."""
    mlp: Index | None
    """Index of the stored MLP that the depth runs; None: dropped."""
    ranks: dict[str, Rank] = Field(default_factory=dict)
    """LoRA rank of each linear that the depth relaxes."""
    vectors: Literal["tied", "own"] = "tied"
    """Place of norms, q/k norms and biases: in the stored parts (`tied`) or in the depth (`own`)."""
    gain: Literal["tied", "own"] = "tied"
    """`own`: the depth scales the output of its mixer and of its MLP by one number each."""
    prefix: Index = 0
    """Number of prefix vectors that every token of the depth attends to; 0: none."""
    window: Annotated[int, Field(gt=0)] | None = None
    rope: Rope | None = None
    kv: tuple[KvRead, ...] = ()
    """Key-value heads that the depth reads from earlier depths; it computes all others itself."""
    exit: Exit | None = None
    quantised: dict[str, SchemeName] = Field(default_factory=dict)
    """Scheme of each linear whose coefficients, or whose LoRA that replaces a stored weight, are stored as integers."""


class Blueprint(Frozen):
    """A stack: pools of stored parts, and the depths that run them, in the order of execution."""

    arch: ArchSpec
    mixers: tuple[MixerPart, ...]
    mlps: tuple[MlpPart, ...]
    depths: tuple[DepthSpec, ...]
    quantised: dict[Literal["embedding", "head"], SchemeName] = Field(default_factory=dict)
    """Scheme of the embedding and of an untied head, if they are stored as integers."""

    @property
    def num_depths(self) -> int:
        return len(self.depths)

    def pool(self, pool: Pool) -> Sequence[Part]:
        """Returns the stored mixers, or the stored MLPs."""
        return self.mixers if pool == "mixer" else self.mlps

    def part_arch(self, pool: Pool, part: int | None) -> ArchSpec:
        """Returns the source's architecture with the sizes of a stored part, which may be narrower."""
        return self.arch if part is None else self.pool(pool)[part].narrow(self.arch)

    def users(self, pool: Pool, part: int) -> tuple[int, ...]:
        """Returns the depths that use a stored part, in the order of execution."""
        return tuple(index for index, depth in enumerate(self.depths) if getattr(depth, pool) == part)

    def keeps_vectors(self, pool: Pool, part: int) -> bool:
        """Says whether a stored part holds its norms and biases; otherwise each depth that uses the part does."""
        return self.depths[self.users(pool, part)[0]].vectors == "tied"

    def made_heads(self, index: int) -> tuple[int, ...]:
        """Returns the key-value heads that a depth computes, for its own attention or for later depths that read."""
        depth = self.depths[index]
        if depth.mixer is None:
            return ()
        every = range(self.part_arch("mixer", depth.mixer).num_key_value_heads)
        wanted = set(every) - {head for read in depth.kv for head in read.heads}
        wanted |= {head for later in self.depths for read in later.kv if read.depth == index for head in read.heads}
        return tuple(head for head in every if head in wanted)

    def keeps_state(self, index: int) -> bool:
        """Says whether a depth keeps a recurrent state instead of keys and values."""
        mixer = self.depths[index].mixer
        return mixer is not None and self.mixers[mixer].mixer.is_recurrent

    def is_read(self, index: int) -> bool:
        """Says whether a later depth reads keys and values of the depth `index`."""
        return any(read.depth == index for depth in self.depths for read in depth.kv)

    @model_validator(mode="before")
    @classmethod
    def _former(cls, value: Any) -> Any:
        return read_stack(value)

    @model_validator(mode="after")
    def _resolved(self) -> "Blueprint":
        for index, part in enumerate(self.mixers):
            where = f"mixers[{index}].mixer"
            try:
                resolved = part.mixer.resolve(self.arch, where)
            except RecipeError as error:
                raise ValueError(str(error)) from None
            if resolved != part.mixer:
                raise ValueError(f"{where}: options resolved against the source are required (got {part.mixer!r})")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Blueprint":
        num_layers = self.arch.num_layers
        if not self.depths:
            raise ValueError("depths: at least one is required (got none)")
        for index, depth in enumerate(self.depths):
            if depth.source >= num_layers:
                raise ValueError(
                    f"depths[{index}].source: layer {depth.source} is out of range ({num_layers} source layers: "
                    f"0..{num_layers - 1})"
                )
        if self.depths[-1].exit is not None:
            raise ValueError(
                f"depths[{len(self.depths) - 1}].exit: an exit must stand before the last depth, which ends in the "
                f"final norm and the head (got one there)"
            )
        for pool in POOLS:
            parts = self.pool(pool)
            for index, depth in enumerate(self.depths):
                used = getattr(depth, pool)
                if used is not None and used >= len(parts):
                    raise ValueError(f"depths[{index}].{pool}: part {used} is out of range ({len(parts)} stored parts)")
            for part, stored in enumerate(parts):
                users = self.users(pool, part)
                if not users:
                    raise ValueError(f"{pool}s[{part}]: every stored part must be used by a depth (no depth uses it)")
                if len({self.depths[user].vectors for user in users}) > 1:
                    raise ValueError(
                        f"{pool}s[{part}]: all depths that use it must agree on `vectors` (depths {list(users)} do not)"
                    )
                for linear, rank in stored.factors.items():
                    bare = [user for user in users if linear not in self.depths[user].ranks]
                    if rank == 0 and bare:
                        raise ValueError(
                            f"{pool}s[{part}].factors.{linear}: a rank above 0 is required where a depth has no LoRA "
                            f"for it (depths {bare} have none)"
                        )
                both = stored.factors.keys() & stored.bases.keys()
                if both:
                    raise ValueError(
                        f"{pool}s[{part}].bases: linears that are no factors are required (got {sorted(both)} as both)"
                    )
                if stored.sources and max(stored.sources) >= num_layers:
                    raise ValueError(
                        f"{pool}s[{part}].sources: layer {max(stored.sources)} is out of range "
                        f"({num_layers} source layers: 0..{num_layers - 1})"
                    )
        for index in range(self.num_depths):
            self._require_readable(index)
        require_sizes(self)
        self._require_quantisable()
        return self

    def _require_quantisable(self) -> None:
        """Checks that schemes are given only for weights that are stored."""
        for pool in POOLS:
            for index, part in enumerate(self.pool(pool)):
                if not part.quantised:
                    continue
                stored = [name for name in part_linears(self, pool, index) if part.factors.get(name) != 0]
                _require_among(f"{pool}s[{index}].quantised", part.quantised, stored)
        for index, depth in enumerate(self.depths):
            if depth.quantised:
                _require_among(f"depths[{index}].quantised", depth.quantised, depth_weights(self, index))
        if self.arch.tied_head and "head" in self.quantised:
            raise ValueError("quantised.head: an untied head is required (it is the embedding); remove `head`")

    def _require_readable(self, index: int) -> None:
        depth, num_heads = self.depths[index], self.arch.num_key_value_heads
        if depth.prefix and not self.made_heads(index):
            raise ValueError(f"depths[{index}].prefix: a mixer that makes keys and values is required (it makes none)")
        for read in depth.kv:
            where = f"depths[{index}].kv"
            if read.depth >= index:
                raise ValueError(f"{where}: an earlier depth is required (got {read.depth})")
            other = self.depths[read.depth]
            if depth.mixer is None or other.mixer is None:
                raise ValueError(f"{where}: a mixer here and at depth {read.depth} is required (one is dropped)")
            require_all_heads(where, [self.mixers[each].num_key_value_heads for each in (depth.mixer, other.mixer)])
            if (depth.window, depth.rope) != (other.window, other.rope):
                raise ValueError(f"{where}: the window and rotary embedding of depth {read.depth} are required")
            if max(read.heads) >= num_heads:
                raise ValueError(f"{where}: head {max(read.heads)} is out of range ({num_heads} key-value heads)")
        read = [head for each in depth.kv for head in each.heads]
        if len(set(read)) < len(read):
            raise ValueError(f"depths[{index}].kv: each head may be read once (got {sorted(read)})")


Linears = dict[str, tuple[int, int]]
"""Linear name to `(out, in)`."""


def part_linears(blueprint: Blueprint, pool: Pool, part: int) -> Linears:
    """Returns the linears of a stored part that at least one of its depths runs."""
    spec = part_spec(blueprint, pool, part)
    unused = unused_names(blueprint, pool, part)
    return {name: shape for name, shape in spec.linears(blueprint.part_arch(pool, part)).items() if name not in unused}


def part_vectors(blueprint: Blueprint, pool: Pool, part: int) -> dict[str, Shape]:
    """Returns the norms and biases of a part that at least one depth uses, whether the part or a depth stores them."""
    spec = part_spec(blueprint, pool, part)
    return _without(spec.vectors(blueprint.part_arch(pool, part)), unused_names(blueprint, pool, part))


def depth_linears(blueprint: Blueprint, index: int) -> Linears:
    """Returns every linear that a depth runs. No linear of a mixer has the name of a linear of the MLP."""
    depth = blueprint.depths[index]
    found: Linears = {}
    if depth.mixer is not None:
        spec = part_spec(blueprint, "mixer", depth.mixer)
        idle = idle_names(blueprint, index)
        arch = blueprint.part_arch("mixer", depth.mixer)
        found |= {name: shape for name, shape in spec.linears(arch).items() if name not in idle}
    if depth.mlp is not None:
        found |= MLP.linears(blueprint.part_arch("mlp", depth.mlp))
    return found


def linear_pools(blueprint: Blueprint, index: int) -> dict[str, Pool]:
    """Returns the pool of each linear that a depth runs, in the order of execution."""
    mixer = blueprint.depths[index].mixer
    of_mixer = {} if mixer is None else part_linears(blueprint, "mixer", mixer)
    return {linear: "mixer" if linear in of_mixer else "mlp" for linear in depth_linears(blueprint, index)}


def depth_factors(blueprint: Blueprint, index: int) -> dict[str, int]:
    """Returns the rank of each linear that a depth runs as two factors, whether the part or the depth stores them."""
    return {**_part_ranks(blueprint, index, "factors"), **depth_coefficients(blueprint, index)}


def depth_coefficients(blueprint: Blueprint, index: int) -> dict[str, int]:
    """Returns the rank of each linear of a depth whose part stores only a basis, so that the depth has coefficients."""
    bases = _part_ranks(blueprint, index, "bases")
    run = depth_linears(blueprint, index) if bases else {}
    return {name: rank for name, rank in bases.items() if name in run}


def depth_weights(blueprint: Blueprint, index: int) -> tuple[str, ...]:
    """Returns the linears whose weights a depth stores: coefficients, and LoRAs that replace a stored weight."""
    factors = _part_ranks(blueprint, index, "factors")
    replaced = (name for name in blueprint.depths[index].ranks if factors.get(name) == 0)
    return (*depth_coefficients(blueprint, index), *replaced)


def depth_vectors(blueprint: Blueprint, index: int, pool: Pool) -> dict[str, Shape]:
    """Returns the norms and biases that a depth uses in one pool: those of its mixer, or of its MLP."""
    part = getattr(blueprint.depths[index], pool)
    if part is None:
        return {}
    vectors = part_spec(blueprint, pool, part).vectors(blueprint.part_arch(pool, part))
    return _without(vectors, idle_names(blueprint, index) if pool == "mixer" else ())


def unused_names(blueprint: Blueprint, pool: Pool, part: int) -> frozenset[str]:
    """Returns the linears and norms of a stored part that no depth runs, and which are therefore not stored."""
    if pool == "mlp":
        return frozenset()
    return frozenset.intersection(*(idle_names(blueprint, user) for user in blueprint.users("mixer", part)))


def users_of(blueprint: Blueprint, pool: Pool, part: int, name: str) -> tuple[int, ...]:
    """Returns the depths that use one linear, norm or bias of a stored part, in the order of execution.

    Args:
        blueprint: The stack.
        pool: The pool of the part.
        part: The index of the part.
        name: The tensor's name in the part, such as `k_proj.weight`.
    """
    owner = name.split(".", 1)[0]
    users = blueprint.users(pool, part)
    return users if pool == "mlp" else tuple(user for user in users if owner not in idle_names(blueprint, user))


def part_spec(blueprint: Blueprint, pool: Pool, part: int) -> PartSpec:
    """Returns the typed object of a stored part: the mixer or the MLP."""
    return MLP if pool == "mlp" else blueprint.mixers[part].mixer


def idle_names(blueprint: Blueprint, index: int) -> frozenset[str]:
    """Returns the linears and norms of its mixer that a depth does not run, because it computes no keys and values."""
    mixer = blueprint.depths[index].mixer
    if mixer is None or blueprint.made_heads(index):
        return frozenset()
    return blueprint.mixers[mixer].mixer.key_value_names


def _part_ranks(blueprint: Blueprint, index: int, name: Literal["factors", "bases"]) -> dict[str, int]:
    depth = blueprint.depths[index]
    parts = [blueprint.pool(pool)[part] for pool in POOLS if (part := getattr(depth, pool)) is not None]
    return {linear: rank for each in parts for linear, rank in getattr(each, name).items()}


def _require_among(where: str, given: Mapping[str, str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{where}: names of stored linears are required (got {name!r}); choose from {list(known)}")


def _without(vectors: Mapping[str, Shape], owners: frozenset[str] | tuple[()]) -> dict[str, Shape]:
    return {name: shape for name, shape in vectors.items() if name.split(".", 1)[0] not in owners}
