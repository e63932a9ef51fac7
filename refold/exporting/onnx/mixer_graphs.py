"""All recurrent mixers in graphs, by their type; with Mamba, which has no heads."""

from collections.abc import Mapping

from refold.exporting.onnx.feature_attention import LinearAttentionGraph
from refold.exporting.onnx.headed_graphs import GatedDeltanetGraph, GlaGraph, Mamba2Graph, RetentionGraph
from refold.exporting.onnx.recurrent import RecurrentGraph, negative_exponential
from refold.mixers.mamba import Mamba


class MambaGraph(RecurrentGraph):
    """Mamba: every channel is a head of its own, whose key has the state dimensions and whose value is one number."""

    def mix(self, x: str) -> str:
        assert isinstance(self.mixer, Mamba)
        graph, (width, state, rank) = self.graph, self.mixer.sizes
        inner = self.convolve(self.part.project("in_proj_x", x), self.mixer.conv, width, "silu")
        low, b, c = graph.split(self.part.project("x_proj", inner), [rank, state, state])
        dt = graph.softplus(self.part.project("dt_proj", low))
        rates = negative_exponential(self.part)
        decay = graph.mul(graph.node("Unsqueeze", dt, graph.constant([3])), rates)
        key, query = (self.widen(each, 1, width, state) for each in (b, c))
        mixed = self.recur(query, key, graph.mul(dt, inner), (width, state, 1), self.together(decay))
        y = graph.add(self.to_compute(mixed), graph.mul(inner, self.part.vector("D")))
        gated = graph.mul(y, graph.activate("silu", self.part.project("in_proj_z", x)))
        return self.part.project("out_proj", gated)


RECURRENT_GRAPHS: Mapping[str, type[RecurrentGraph]] = {
    "retention": RetentionGraph,
    "gla": GlaGraph,
    "mamba": MambaGraph,
    "mamba2": Mamba2Graph,
    "gated_deltanet": GatedDeltanetGraph,
    "linear_attention": LinearAttentionGraph,
}
"""The graph of each recurrent mixer, by its `type`."""
