"""Weights that are stored as integers, or would be: which tensors they are, and their bytes."""

from collections.abc import Mapping
from typing import Literal

from refold.blueprint.integers import Scheme
from refold.blueprint.kinds import TargetTensor
from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import float_tensors
from refold.families.arch import Frozen

OUTER = ("embedding", "head")


def is_quantised(blueprint: Blueprint, tensor: TargetTensor) -> bool:
    """Says whether a scheme for linears rounds a tensor: the weight of a linear, or a factor of it.

    LoRA factors count as quantised weights only where the linear has no stored weight of its own.
    """
    return tensor.kind.is_quantised(blueprint, tensor)


def quantised_bytes(blueprint: Blueprint, dtype_bytes: int, scheme: Scheme) -> int:
    """Returns the weight bytes of a blueprint after quantisation of all linears.

    Args:
        blueprint: The blueprint; `is_quantised` selects the tensors.
        dtype_bytes: Bytes of one number in all other tensors.
        scheme: The quantisation scheme.
    """
    total = 0
    for tensor in float_tensors(blueprint):
        if is_quantised(blueprint, tensor):
            rows, columns = tensor.shape
            total += scheme.num_bytes(rows, columns)
        else:
            total += tensor.num_elements * dtype_bytes
    return total


def with_schemes(blueprint: Blueprint, schemes: Mapping[str, str | None]) -> Blueprint:
    """Returns a blueprint whose weights are stored by schemes.

    Args:
        blueprint: A blueprint.
        schemes: By the name of a tensor in `float_tensors`; None, or no entry: as floats.
    """
    outer: dict[Literal["embedding", "head"], str] = {}
    parts: dict[tuple[str, int], dict[str, str]] = {}
    depths: dict[int, dict[str, str]] = {}
    for tensor in float_tensors(blueprint):
        scheme = schemes.get(tensor.name)
        if scheme is None:
            continue
        if tensor.kind.place == "embedding" or tensor.kind.place == "head":
            outer[tensor.kind.place] = scheme
        elif tensor.depth is not None:
            depths.setdefault(tensor.depth, {})[tensor.linear] = scheme
        else:
            assert tensor.pool is not None
            assert tensor.part is not None
            parts.setdefault((tensor.pool, tensor.part), {})[tensor.linear] = scheme
    made: dict[str, tuple[Frozen, ...]] = {
        f"{pool}s": tuple(
            part.model_copy(update={"quantised": parts.get((pool, index), {})})
            for index, part in enumerate(blueprint.pool(pool))
        )
        for pool in ("mixer", "mlp")
    }
    made["depths"] = tuple(
        depth.model_copy(update={"quantised": depths.get(index, {})}) for index, depth in enumerate(blueprint.depths)
    )
    return blueprint.model_copy(update={**made, "quantised": outer})


def without_schemes(blueprint: Blueprint) -> Blueprint:
    """Returns the blueprint with all weights as floats."""
    return with_schemes(blueprint, {})


def holds_integers(blueprint: Blueprint) -> bool:
    """Says whether any weight is stored as integers."""
    holders = (*blueprint.mixers, *blueprint.mlps, *blueprint.depths, blueprint)
    return any(holder.quantised for holder in holders)


def describe_schemes(blueprint: Blueprint) -> str:
    """Returns the number of weights by scheme in words, such as `42 weights int4, 1 int8, 25 tensors as floats`."""
    counts: dict[str, int] = {}
    num_floats = 0
    for tensor in float_tensors(blueprint):
        name = tensor.scheme_name(blueprint)
        if name is None:
            num_floats += 1
        else:
            counts[name] = counts.get(name, 0) + 1
    told = [f"{count} weights {name}" for name, count in counts.items()]
    return ", ".join((*told, f"{num_floats} tensors as floats"))
