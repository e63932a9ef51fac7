"""Sizes of stored parts: an MLP with fewer neurons and an attention with fewer heads than the source's layers."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from refold.families.arch import ArchSpec
from refold.mixers.spec import MixerSpec

LAST_LINEARS: "Mapping[Pool, str]" = {"mixer": "o_proj", "mlp": "down_proj"}
"""The linear of each pool whose inputs are the outputs of heads or neurons, and which is refitted to those kept."""

if TYPE_CHECKING:
    from refold.blueprint.schema import Blueprint, Pool


def narrow_mlp(arch: ArchSpec, neurons: int | None) -> ArchSpec:
    """Returns an architecture with another number of neurons; None: the same."""
    return arch if neurons is None else arch.model_copy(update={"intermediate_size": neurons})


def narrow_heads(arch: ArchSpec, groups: int | None) -> ArchSpec:
    """Returns an architecture with another number of key-value heads, each with its query heads; None: the same."""
    if groups is None:
        return arch
    readers = arch.num_attention_heads // arch.num_key_value_heads
    return arch.model_copy(update={"num_key_value_heads": groups, "num_attention_heads": readers * groups})


def require_sizes(blueprint: "Blueprint") -> None:
    """Checks the sizes of all stored parts.

    Raises:
        ValueError: A size is not below the source's, or a mixer cannot lose heads.
    """
    sizes: dict[Pool, str] = {"mixer": "num_key_value_heads", "mlp": "intermediate_size"}
    for pool, size in sizes.items():
        most = getattr(blueprint.arch, size)
        for index, part in enumerate(blueprint.pool(pool)):
            found, where = getattr(part, size), f"{pool}s[{index}].{size}"
            if found is not None and found >= most:
                raise ValueError(
                    f"{where}: a number below the source's {most} is required (got {found}); leave it out for all"
                )
    for index, part in enumerate(blueprint.mixers):
        reason = "" if part.num_key_value_heads is None else heads_obstacle(blueprint.arch, part.mixer)
        if reason:
            raise ValueError(f"mixers[{index}].num_key_value_heads: {reason}; leave it out")


def heads_obstacle(arch: ArchSpec, mixer: MixerSpec) -> str:
    """Returns the reason why a mixer cannot have fewer heads than the source; empty: it can."""
    if not mixer.is_native:
        return f"the source's attention is required for fewer heads (got {mixer.type})"
    if arch.qk_norm == "full":
        return f"a norm over each head alone is required for fewer heads ({arch.family} norms all heads at once)"
    return ""


def require_all_heads(where: str, groups: Iterable[int | None]) -> None:
    """Checks that depths which share keys and values have all key-value heads of the source.

    Raises:
        ValueError: One has fewer.
    """
    narrow = [each for each in groups if each is not None]
    if narrow:
        raise ValueError(
            f"{where}: all key-value heads of the source are required at both depths (one has {narrow[0]}); "
            f"keep its heads, or do not share"
        )


def kept_units(blueprint: "Blueprint", pool: "Pool", part: int) -> str:
    """Returns the name of the units of which a part stores only some; empty: the part is not narrower."""
    size, noun = ("num_key_value_heads", "key-value heads") if pool == "mixer" else ("intermediate_size", "neurons")
    return "" if getattr(blueprint.pool(pool)[part], size) is None else noun


def head_counts(blueprint: "Blueprint") -> list[int]:
    """Returns the different numbers of key-value heads of the depths with a mixer, ascending."""
    used = {depth.mixer for depth in blueprint.depths if depth.mixer is not None}
    return sorted({blueprint.part_arch("mixer", part).num_key_value_heads for part in used})


def neuron_counts(blueprint: "Blueprint") -> list[int]:
    """Returns the different numbers of neurons of the depths with an MLP, ascending."""
    used = {depth.mlp for depth in blueprint.depths if depth.mlp is not None}
    return sorted({blueprint.part_arch("mlp", part).intermediate_size for part in used})


def widest_arch(blueprint: "Blueprint") -> ArchSpec:
    """Returns the architecture with the sizes of the widest parts; the sizes of all, where they are even."""
    heads, neurons = head_counts(blueprint), neuron_counts(blueprint)
    arch = narrow_heads(blueprint.arch, heads[-1]) if heads else blueprint.arch
    return narrow_mlp(arch, neurons[-1]) if neurons else arch
