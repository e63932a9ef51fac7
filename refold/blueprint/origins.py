"""How each tensor of a target starts: what the plan tells and the converter does."""

from dataclasses import dataclass
from typing import Literal

from refold.blueprint.schema import Blueprint, Pool
from refold.blueprint.starts import Starts
from refold.blueprint.tensors import TargetTensor

How = Literal["copied", "averaged", "fresh", "factorised", "joint"]


@dataclass(frozen=True)
class Origin:
    """Where a target tensor's first values come from.

    Attributes:
        how: `copied` from one layer (or from outside the layers); `averaged` over `layers`; `fresh`; `factorised`: the
            LoRA of a residual's truncated SVD; `joint`: fitted together with all tensors that share the linear.
        canonical: Name of the source's canonical tensor, such as `mixer.q_proj.weight`; of a LoRA that of its linear,
            of a gate its own name in its exit.
        layers: Source layers read for it. Of `factorised` the layer the depth stands for; of `joint` all layers tied to
            the part. Empty outside the layers, and for `fresh`.
    """

    how: How
    canonical: str
    layers: tuple[int, ...] = ()


def origin(blueprint: Blueprint, starts: Starts, tensor: TargetTensor) -> Origin:
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
    if tensor.pool is None:
        canonical = tensor.name.removeprefix("model.")
        return Origin("fresh" if starts.weights == "fresh" else "copied", canonical)
    if tensor.role in ("lora_a", "lora_b"):
        return _lora_origin(blueprint, starts, tensor)
    canonical = f"{tensor.pool}.{tensor.local}"
    if starts.weights == "fresh":
        return Origin("fresh", canonical)
    if tensor.part is None:
        assert tensor.depth is not None
        return Origin("copied", canonical, (blueprint.depths[tensor.depth].source,))
    sources = blueprint.pool(tensor.pool)[tensor.part].sources
    if not sources:
        return Origin("fresh", canonical)
    if tensor.role == "linear" and starts.lora == "joint" and is_relaxed(blueprint, tensor):
        return Origin("joint", canonical, tied_layers(blueprint, tensor.pool, tensor.part))
    return Origin("copied" if len(sources) == 1 else "averaged", canonical, sources)


def is_relaxed(blueprint: Blueprint, tensor: TargetTensor) -> bool:
    """Says whether any depth has a LoRA for this stored linear."""
    assert tensor.pool is not None
    assert tensor.part is not None
    linear = tensor.local.removesuffix(".weight")
    return any(linear in blueprint.depths[user].ranks for user in blueprint.users(tensor.pool, tensor.part))


def tied_layers(blueprint: Blueprint, pool: Pool, part: int) -> tuple[int, ...]:
    """Returns the source layers that the depths using a part stand for, top to bottom."""
    return tuple(blueprint.depths[user].source for user in blueprint.users(pool, part))


def _exit_origin(starts: Starts, tensor: TargetTensor) -> Origin:
    if tensor.local.startswith("norm."):
        return Origin("fresh" if starts.weights == "fresh" else "copied", tensor.local)
    return Origin("fresh", "lm_head.weight" if tensor.local.startswith("lora.") else tensor.local)


def _lora_origin(blueprint: Blueprint, starts: Starts, tensor: TargetTensor) -> Origin:
    assert tensor.pool is not None
    assert tensor.depth is not None
    canonical = f"{tensor.pool}.{tensor.local}.weight"
    depth = blueprint.depths[tensor.depth]
    part = getattr(depth, tensor.pool)
    sources = blueprint.pool(tensor.pool)[part].sources
    if starts.lora == "zero" or starts.weights == "fresh" or not sources:
        return Origin("fresh", canonical)
    if starts.lora == "joint":
        return Origin("joint", canonical, tied_layers(blueprint, tensor.pool, part))
    if sources == (depth.source,):
        return Origin("fresh", canonical)
    return Origin("factorised", canonical, (depth.source,))
