"""How each tensor of a target starts: what the plan tells and the converter does."""

from dataclasses import dataclass
from typing import Literal

from refold.blueprint.initialisation import Initialisation
from refold.blueprint.schema import Blueprint, Pool
from refold.blueprint.tensors import TargetTensor, users_of
from refold.mixers.spec import Carried

How = Literal["copied", "averaged", "fresh", "factorised", "joint"]


@dataclass(frozen=True)
class Origin:
    """Where a target tensor's first values come from.

    Attributes:
        how: `copied` from one layer (or from outside the layers); `averaged` over `layers`; `fresh`; `factorised`: from
            a truncated SVD, of a residual where it is a LoRA; `joint`: fitted together with all that share the linear.
        canonical: Name of the source's canonical tensor, such as `mixer.q_proj.weight`; of a LoRA that of its linear,
            of a gate its own name in its exit.
        repeat: How often each head of the source's tensor stands in the target's, before anything else is done.
        layers: Source layers read for it. Of `factorised` the layer the depth stands for; of `joint` all layers tied to
            the part. Empty outside the layers, and for `fresh`.
    """

    how: How
    canonical: str
    layers: tuple[int, ...] = ()
    repeat: int = 1


def carried_tensor(blueprint: Blueprint, starts: Initialisation, part: int, local: str) -> Carried | None:
    """Says how a tensor of a stored mixer is taken over from source layers; None: it is not, and starts fresh.

    Args:
        blueprint: The target.
        starts: How it starts.
        part: Index of the stored mixer.
        local: The tensor's name in it.
    """
    found = blueprint.mixers[part].mixer.carried(blueprint.arch).get(local)
    if found is None or found.misfit:
        return None
    transfers = starts.transfers_of(part)
    return found if not found.group or transfers is None or found.group in transfers else None


def origin(blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> Origin:
    """Says how a tensor of the target starts.

    A LoRA whose stored weight is exactly its depth's own source starts `fresh`: its residual is zero. Fresh LoRAs have
    a Gaussian A and a zero B. What an exit has of its own starts so that it leaves through the shared norm and head.

    Args:
        blueprint: The target.
        starts: How it starts.
        tensor: One of `target_tensors(blueprint)`.
    """
    if tensor.role == "exit":
        return _exit_origin(starts, tensor)
    if tensor.role == "prefix":
        return Origin("fresh", tensor.local)
    if tensor.pool is None:
        canonical = tensor.name.removeprefix("model.")
        return Origin("fresh" if starts.weights == "fresh" else "copied", canonical)
    if tensor.role in ("lora_a", "lora_b"):
        return _lora_origin(blueprint, starts, tensor)
    part = part_of(blueprint, tensor)
    is_factor = tensor.role in ("factor_a", "factor_b", "coefficients")
    local = f"{tensor.linear}.weight" if is_factor else tensor.local
    carried = _carried(blueprint, starts, tensor.pool, part, local)
    sources = sources_of(blueprint, tensor.pool, part, local)
    if carried is None or not sources or starts.weights == "fresh":
        return Origin("fresh", f"{tensor.pool}.{local}")
    canonical, repeat = carried.canonical, carried.repeat
    if is_factor and tensor.linear in blueprint.pool(tensor.pool)[part].bases:
        return Origin("joint", canonical, tied_layers(blueprint, tensor.pool, part, local), repeat)
    if tensor.part is None:
        assert tensor.depth is not None
        return Origin("copied", canonical, (blueprint.depths[tensor.depth].source,), repeat)
    if starts.lora == "joint" and (is_factor or tensor.role == "linear") and is_relaxed(blueprint, tensor):
        return Origin("joint", canonical, tied_layers(blueprint, tensor.pool, tensor.part, local), repeat)
    if is_factor:
        return Origin("factorised", canonical, sources, repeat)
    return Origin("copied" if len(sources) == 1 else "averaged", canonical, sources, repeat)


def part_of(blueprint: Blueprint, tensor: TargetTensor) -> int:
    """Returns the stored part that a tensor of a mixer or MLP belongs to, or that the depth owning it runs."""
    assert tensor.pool is not None
    if tensor.part is not None:
        return tensor.part
    assert tensor.depth is not None
    part = getattr(blueprint.depths[tensor.depth], tensor.pool)
    assert part is not None
    return part


def _carried(blueprint: Blueprint, starts: Initialisation, pool: Pool, part: int, local: str) -> Carried | None:
    return carried_tensor(blueprint, starts, part, local) if pool == "mixer" else Carried(f"{pool}.{local}")


def is_relaxed(blueprint: Blueprint, tensor: TargetTensor) -> bool:
    """Says whether any depth has a LoRA for this stored linear."""
    assert tensor.pool is not None
    assert tensor.part is not None
    return any(tensor.linear in blueprint.depths[user].ranks for user in blueprint.users(tensor.pool, tensor.part))


def tied_layers(blueprint: Blueprint, pool: Pool, part: int, local: str) -> tuple[int, ...]:
    """Returns the source layers that the depths using one tensor of a part stand for, top to bottom."""
    return tuple(blueprint.depths[user].source for user in users_of(blueprint, pool, part, local))


def sources_of(blueprint: Blueprint, pool: Pool, part: int, local: str) -> tuple[int, ...]:
    """Returns the source layers one tensor of a part starts from.

    They are the part's; of a mean over several only those whose depths use the tensor, if any of them does.
    """
    sources = blueprint.pool(pool)[part].sources
    if len(sources) < 2:
        return sources
    used = set(tied_layers(blueprint, pool, part, local))
    return tuple(layer for layer in sources if layer in used) or sources


def _exit_origin(starts: Initialisation, tensor: TargetTensor) -> Origin:
    if tensor.local.startswith("norm."):
        return Origin("fresh" if starts.weights == "fresh" else "copied", tensor.local)
    return Origin("fresh", "lm_head.weight" if tensor.local.startswith("lora.") else tensor.local)


def _lora_origin(blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> Origin:
    assert tensor.pool is not None
    assert tensor.depth is not None
    part = part_of(blueprint, tensor)
    carried = _carried(blueprint, starts, tensor.pool, part, f"{tensor.local}.weight")
    depth = blueprint.depths[tensor.depth]
    local = f"{tensor.local}.weight"
    sources = sources_of(blueprint, tensor.pool, part, local)
    if carried is None or starts.lora == "zero" or starts.weights == "fresh" or not sources:
        return Origin("fresh", f"{tensor.pool}.{tensor.local}.weight")
    if starts.lora == "joint":
        layers = tied_layers(blueprint, tensor.pool, part, local)
        return Origin("joint", carried.canonical, layers, carried.repeat)
    if sources == (depth.source,) and tensor.linear not in blueprint.pool(tensor.pool)[part].factors:
        return Origin("fresh", carried.canonical)
    return Origin("factorised", carried.canonical, (depth.source,), carried.repeat)
