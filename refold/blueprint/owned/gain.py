"""Gains: one number for each part of a depth that scales the part's output before the residual sum."""

from collections.abc import Iterator
from dataclasses import replace

from refold.blueprint.kinds import TargetTensor
from refold.blueprint.origins import Initialisation, Origin
from refold.blueprint.owned.kind import OwnedKind
from refold.blueprint.owned.merge import Merge
from refold.blueprint.schema import POOLS, Blueprint, Pool
from refold.families.arch import ArchSpec
from refold.mixers.spec import Fill


class ResidualGain(OwnedKind):
    """The scalar g of x + g F(x), one for each part F that the depth runs (ReZero, equation 1).

    ReZero initialises g to 0, refold to 1, so that the depth first computes the same bits as without a gain. The cost
    does not count the multiplication by g, just as it does not count norms.
    """

    url = "https://arxiv.org/abs/2003.04887"
    field = "gain"
    groups = frozenset({"adapters", "gains"})

    def tensors(self, blueprint: Blueprint, index: int) -> Iterator[TargetTensor]:
        depth = blueprint.depths[index]
        if depth.gain == "own":
            for pool in POOLS:
                if getattr(depth, pool) is not None:
                    name = f"model.depths.{index}.gain.{pool}.weight"
                    yield TargetTensor(name, (1,), self, pool, depth=index, local="gain.weight")

    def describe(self, blueprint: Blueprint, index: int) -> str:
        return "gain" if blueprint.depths[index].gain == "own" else ""

    def notes(self, blueprint: Blueprint) -> tuple[str, ...]:
        counts = [len(list(self.tensors(blueprint, index))) for index in range(blueprint.num_depths)]
        if not any(counts):
            return ()
        depths = sum(map(bool, counts))
        return (f"relax.gain: {depths} depths scale the output of their parts ({sum(counts)} parameters, 1 at first)",)

    def origin(self, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> Origin:
        return Origin("fresh", f"{tensor.pool}.{tensor.local}")

    def fill(self, blueprint: Blueprint, tensor: TargetTensor) -> Fill:
        return Fill("constant", 1.0)

    def explain(self, made: Origin, blueprint: Blueprint, starts: Initialisation, tensor: TargetTensor) -> str:
        return "ones: without effect at first"

    def merge(self, merge: Merge, blueprint: Blueprint, index: int, pool: Pool, local: str) -> Merge:
        """Scales the last weight and bias of the part: those of its output norm, or else of its output projection."""
        owner, _, kind = local.rpartition(".")
        if blueprint.depths[index].gain == "tied" or owner != self._owner(blueprint.arch, pool):
            return merge
        is_norm = owner == "output_norm" and kind == "weight"
        offset = blueprint.arch.norm.offset if is_norm else 0.0
        return replace(merge, scale=f"model.depths.{index}.gain.{pool}.weight", offset=offset)

    def _owner(self, arch: ArchSpec, pool: Pool) -> str:
        if arch.output_norms:
            return "output_norm"
        return "o_proj" if pool == "mixer" else "down_proj"


GAIN = ResidualGain()
