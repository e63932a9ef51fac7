"""Coefficients of shared bases: the second factor of a linear whose first factor, the basis, several depths share."""

from collections.abc import Iterator

from refold.blueprint.kinds import LinearKind, TargetTensor
from refold.blueprint.origins import Initialisation, Origin, carry_over, describe_weighting, tied_layers
from refold.blueprint.owned.kind import OwnedKind
from refold.blueprint.owned.lora import span
from refold.blueprint.owned.merge import Merge
from refold.blueprint.schema import Blueprint, Pool, depth_coefficients, depth_linears, linear_pools


class BasisCoefficients(OwnedKind, LinearKind):
    """B `[out, rank]` of y = B (A x), for each linear of which the part stores only the basis A (Basis Sharing)."""

    url = "https://arxiv.org/abs/2410.03765"
    field = "bases"

    def tensors(self, blueprint: Blueprint, index: int) -> Iterator[TargetTensor]:
        ranks, linears = depth_coefficients(blueprint, index), depth_linears(blueprint, index)
        for linear, pool in linear_pools(blueprint, index).items():
            if linear in ranks:
                name, shape = f"model.depths.{index}.coefficients.{linear}", (linears[linear][0], ranks[linear])
                yield TargetTensor(name, shape, self, pool, depth=index, local=linear)

    def describe(self, blueprint: Blueprint, index: int) -> str:
        ranks = depth_coefficients(blueprint, index)
        return f"basis {span(list(ranks.values()))}" if ranks else ""

    def origin(self, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> Origin:
        assert tensor.pool is not None
        part, local = tensor.part_in(blueprint), f"{tensor.linear}.weight"
        found = carry_over(blueprint, starts, tensor.pool, part, local)
        if found is None:
            return Origin("fresh", f"{tensor.pool}.{local}")
        layers = tied_layers(blueprint, tensor.pool, part, local)
        return Origin("joint", found[0].canonical, layers, found[0].repeat)

    def explain(self, made: Origin, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> str | None:
        together = f"basis and coefficients fitted together{describe_weighting(starts)}"
        return together if made.how == "joint" else None

    def flops(self, blueprint: Blueprint, index: int) -> int:
        linears = depth_linears(blueprint, index)
        return 2 * sum(rank * linears[name][0] for name, rank in depth_coefficients(blueprint, index).items())

    def merge(self, merge: Merge, blueprint: Blueprint, index: int, pool: Pool, local: str) -> Merge:
        linear, _, kind = local.rpartition(".")
        part = getattr(blueprint.depths[index], pool)
        if kind != "weight" or linear not in blueprint.pool(pool)[part].bases:
            return merge
        return merge.plus(f"model.{pool}s.{part}.{linear}.a.weight", f"model.depths.{index}.coefficients.{linear}")


COEFFICIENTS = BasisCoefficients()
