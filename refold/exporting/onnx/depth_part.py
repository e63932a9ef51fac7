"""One part of one depth in a graph: its linears, norms and vectors with all that the depth adds to them."""

from refold.blueprint.owned.merge import Merge
from refold.blueprint.owned.registry import merge_at
from refold.blueprint.schema import Blueprint, Pool, depth_vectors
from refold.exporting.onnx.graph import GraphBuilder
from refold.exporting.onnx.weights import GraphWeights
from refold.families.arch import ArchSpec, Norm


class DepthPart:
    """The mixer or the MLP that a depth runs.

    Args:
        graph: The graph.
        weights: Its weights.
        blueprint: The stack.
        index: The depth.
        pool: Mixer or MLP.
    """

    def __init__(self, graph: GraphBuilder, weights: GraphWeights, blueprint: Blueprint, index: int, pool: Pool):
        self.graph, self.weights, self.index = graph, weights, index
        self.arch: ArchSpec = blueprint.part_arch(pool, getattr(blueprint.depths[index], pool))
        self.blueprint = blueprint
        self._pool: Pool = pool
        self._vectors = depth_vectors(blueprint, index, pool)

    def has(self, local: str) -> bool:
        """Says whether the part has a vector, such as `q_proj.bias`, at this depth."""
        return local in self._vectors

    def stored(self, local: str) -> str:
        """Returns the name of the tensor of a vector: the part's own or the depth's own."""
        name = self._merge(local).stored
        assert name is not None
        return name

    def vector(self, local: str, offset: float = 0.0) -> str:
        """Returns a vector plus a number."""
        return self.weights.vector(self.stored(local), offset)

    def project(self, linear: str, x: str) -> str:
        """Runs a linear: the stored weight or its factors, the depth's LoRA or coefficients, and the bias."""
        merge, found = self._merge(f"{linear}.weight"), None
        if merge.stored is not None:
            found = self.weights.multiply(x, merge.stored)
        for a, b in merge.products:
            product = self.weights.multiply(self.weights.multiply(x, a), b)
            found = product if found is None else self.graph.add(found, product)
        assert found is not None
        return self.graph.add(found, self.vector(f"{linear}.bias")) if self.has(f"{linear}.bias") else found

    def normalise(self, name: str, x: str) -> str:
        """Runs a norm over the last axis; returns `x` where the part has no norm of this name."""
        if not self.has(f"{name}.weight"):
            return x
        norm = self.arch.norm
        bias = self.vector(f"{name}.bias") if self.has(f"{name}.bias") else ""
        return run_norm(self.graph, norm, x, self.vector(f"{name}.weight", norm.offset), bias)

    def scale(self, x: str) -> str:
        """Multiplies the part's output by the gain of the depth, where it has one."""
        if self.blueprint.depths[self.index].gain == "tied":
            return x
        return self.graph.mul(x, self.weights.vector(f"model.depths.{self.index}.gain.{self._pool}.weight"))

    def _merge(self, local: str) -> Merge:
        # The scale in it is the gain, which `scale` applies to the output.
        merge = merge_at(self.blueprint, self.index, self._pool, local)
        assert merge is not None
        return merge


def run_norm(graph: GraphBuilder, norm: Norm, x: str, weight: str, bias: str = "") -> str:
    """Runs a norm over the last axis; the weight includes the norm's offset."""
    if norm.kind == "layer":
        return graph.node("LayerNormalization", x, weight, bias, axis=-1, epsilon=norm.eps)
    normed = graph.node("RMSNormalization", x, weight, axis=-1, epsilon=norm.eps)
    return graph.add(normed, bias) if bias else normed
