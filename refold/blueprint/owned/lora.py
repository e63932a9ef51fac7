"""LoRA pairs: the low-rank correction of one linear at one depth, y = W x + B (A x)."""

from collections.abc import Iterator

from refold.blueprint.kinds import ZEROS, LinearKind, TargetTensor
from refold.blueprint.origins import Initialisation, Origin, carry_over, describe_svd, describe_weighting, tied_layers
from refold.blueprint.owned.kind import OwnedKind
from refold.blueprint.owned.merge import Merge
from refold.blueprint.schema import Blueprint, Pool, depth_linears, linear_pools
from refold.mixers.spec import Fill


def span(ranks: list[int]) -> str:
    """Returns the range of some ranks in words, such as `2..8`, or `4` if all are equal."""
    least, *others = sorted(set(ranks))
    return f"{least}..{others[-1]}" if others else str(least)


class LoraFactors(OwnedKind, LinearKind):
    """A `[rank, in]` and B `[out, rank]` for each linear with a rank at the depth (RRT, section 2.3)."""

    url = "https://arxiv.org/abs/2410.20672"
    field = "ranks"
    groups = frozenset({"adapters"})

    def tensors(self, blueprint: Blueprint, index: int) -> Iterator[TargetTensor]:
        ranks, linears = blueprint.depths[index].ranks, depth_linears(blueprint, index)
        for linear, pool in linear_pools(blueprint, index).items():
            if linear in ranks:
                (rows, columns), name = linears[linear], f"model.depths.{index}.lora.{linear}"
                for side, shape in (("a", (ranks[linear], columns)), ("b", (rows, ranks[linear]))):
                    yield TargetTensor(f"{name}.{side}", shape, self, pool, depth=index, local=linear)

    def describe(self, blueprint: Blueprint, index: int) -> str:
        ranks = blueprint.depths[index].ranks
        return span(list(ranks.values())) if ranks else ""

    def origin(self, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> Origin:
        """Returns the origin. A LoRA is fresh if the stored weight equals the depth's source, without an error."""
        assert tensor.pool is not None
        assert tensor.depth is not None
        part, local = tensor.part_in(blueprint), f"{tensor.linear}.weight"
        found = carry_over(blueprint, starts, tensor.pool, part, local)
        if found is None or starts.lora == "zero":
            return Origin("fresh", f"{tensor.pool}.{local}")
        carried, sources = found
        if starts.lora == "joint":
            layers = tied_layers(blueprint, tensor.pool, part, local)
            return Origin("joint", carried.canonical, layers, carried.repeat)
        source = blueprint.depths[tensor.depth].source
        if sources == (source,) and tensor.linear not in blueprint.pool(tensor.pool)[part].factors:
            return Origin("fresh", carried.canonical)
        return Origin("factorised", carried.canonical, (source,), carried.repeat)

    def fill(self, blueprint: Blueprint, tensor: TargetTensor) -> Fill:
        return ZEROS if tensor.name.endswith(".b") else Fill("normal", tensor.shape[1] ** -0.5)

    def explain(self, made: Origin, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> str:
        if made.how == "fresh":
            is_chosen = starts.lora == "zero" or starts.weights == "fresh"
            return "Gaussian A, zero B" + ("" if is_chosen else ": nothing to correct")
        if made.how == "joint":
            return f"stored weight and LoRAs fitted together{describe_weighting(starts)}"
        return describe_svd("source minus stored weight", starts)

    def line_name(self, tensor: TargetTensor) -> str:
        return tensor.name.rpartition(".")[0] + ".*"

    def is_quantised(self, blueprint: Blueprint, tensor: TargetTensor) -> bool:
        """Says whether the linear has no stored weight, so that the pair replaces it."""
        assert tensor.pool is not None
        return blueprint.pool(tensor.pool)[tensor.part_in(blueprint)].factors.get(tensor.linear) == 0

    def flops(self, blueprint: Blueprint, index: int) -> int:
        linears = depth_linears(blueprint, index)
        return 2 * sum(rank * sum(linears[name]) for name, rank in blueprint.depths[index].ranks.items())

    def merge(self, merge: Merge, blueprint: Blueprint, index: int, pool: Pool, local: str) -> Merge:
        linear, _, kind = local.rpartition(".")
        if kind != "weight" or linear not in blueprint.depths[index].ranks:
            return merge
        name = f"model.depths.{index}.lora.{linear}"
        return merge.plus(f"{name}.a", f"{name}.b")


LORA = LoraFactors()
