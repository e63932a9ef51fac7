"""Own vectors: norms and biases that a depth stores instead of sharing those of its parts."""

from collections.abc import Iterator
from dataclasses import replace

from refold.blueprint.kinds import TargetTensor, vector_fill
from refold.blueprint.origins import Initialisation, Origin, carry_over
from refold.blueprint.owned.kind import OwnedKind
from refold.blueprint.owned.merge import Merge
from refold.blueprint.schema import POOLS, Blueprint, Pool, depth_vectors
from refold.mixers.spec import Fill


class DepthVectors(OwnedKind):
    """Norms, q/k norms, biases and other vectors of the parts that a depth runs, for depths with `vectors: own`."""

    url = "https://arxiv.org/abs/2410.20672"
    field = "vectors"
    column = "vectors"
    groups = frozenset({"vectors"})

    def tensors(self, blueprint: Blueprint, index: int) -> Iterator[TargetTensor]:
        if blueprint.depths[index].vectors == "own":
            for pool in POOLS:
                for local, shape in depth_vectors(blueprint, index, pool).items():
                    name = f"model.depths.{index}.vectors.{pool}.{local}"
                    yield TargetTensor(name, shape, self, pool, depth=index, local=local)

    def describe(self, blueprint: Blueprint, index: int) -> str:
        return blueprint.depths[index].vectors

    def origin(self, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> Origin:
        assert tensor.pool is not None
        assert tensor.depth is not None
        found = carry_over(blueprint, starts, tensor.pool, tensor.part_in(blueprint), tensor.local)
        if found is None:
            return Origin("fresh", f"{tensor.pool}.{tensor.local}")
        return Origin("copied", found[0].canonical, (blueprint.depths[tensor.depth].source,), found[0].repeat)

    def fill(self, blueprint: Blueprint, tensor: TargetTensor) -> Fill:
        assert tensor.pool is not None
        return vector_fill(blueprint, tensor.pool, tensor.part_in(blueprint), tensor.local)

    def merge(self, merge: Merge, blueprint: Blueprint, index: int, pool: Pool, local: str) -> Merge:
        if blueprint.depths[index].vectors == "tied" or local not in depth_vectors(blueprint, index, pool):
            return merge
        return replace(merge, stored=f"model.depths.{index}.vectors.{pool}.{local}")


VECTORS = DepthVectors()
