"""Recurrent mixers with queries, keys and values in heads, in a graph."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from refold.exporting.onnx.batch_values import BatchValues
from refold.exporting.onnx.depth_part import DepthPart
from refold.exporting.onnx.recurrent import RecurrentGraph, negative_exponential
from refold.mixers.gated_deltanet import GatedDeltanet
from refold.mixers.gla import Gla
from refold.mixers.heads import HeadedSpec
from refold.mixers.mamba2 import Mamba2
from refold.mixers.retention import Retention
from refold.nn.mixers.gated_deltanet import UNIT_EPS
from refold.nn.mixers.retention import log_decays


class HeadedGraph(RecurrentGraph):
    """A mixer with queries, keys and values in heads."""

    def __init__(self, part: DepthPart, batch: BatchValues):
        super().__init__(part, batch)
        assert isinstance(self.mixer, HeadedSpec)
        self.spec, self.layout = self.mixer, self.mixer.layout
        self.sizes = self.layout.heads, self.layout.key_dim, self.layout.value_dim

    def read(self, x: str) -> tuple[str, str, str]:
        """Returns queries, keys and values, convolved, activated and rotated, with all heads of the state."""
        layout, graph = self.layout, self.graph
        counts = layout.q_heads, layout.k_heads, layout.v_heads
        sizes = layout.key_dim, layout.key_dim, layout.value_dim
        parts: Sequence[str] = [self.part.project(name, x) for name in ("q_proj", "k_proj", "v_proj")]
        if self.spec.conv_width:
            joined = graph.concat(parts, 2)
            joined = self.convolve(joined, self.spec.conv_width, layout.read_width, self.spec.conv_function)
            parts = graph.split(joined, [count * size for count, size in zip(counts, sizes, strict=True)])
        parts = [graph.activate(self.spec.input_activation, each) for each in parts]
        rope = self.part.blueprint.depths[self.index].rope
        if rope is not None and self.spec.is_rotary:
            turned = [self.batch.rotate(each, rope, count) for each, count in zip(parts[:2], counts[:2], strict=True)]
            parts = [*turned, parts[2]]
        query, key, value = (
            self.widen(each, count, layout.heads, size) for each, count, size in zip(parts, counts, sizes, strict=True)
        )
        return query, key, value

    def scaled(self, query: str) -> str:
        return self.graph.mul(query, self.graph.number(self.layout.key_dim**-0.5))

    def mix(self, x: str) -> str:
        return self.part.project("o_proj", self.finish(x, self.to_compute(self.recurrence(x))))

    @abstractmethod
    def recurrence(self, x: str) -> str:
        """Adds the recurrence and returns its output `[B, T, heads x value size]`, float32."""

    def finish(self, x: str, mixed: str) -> str:
        """Norms, then gates the outputs."""
        if self.spec.norm == "head":
            apart = self.apart(mixed, self.layout.heads, self.layout.value_dim)
            mixed = self.together(self.norm(apart, self.layout.value_dim, self._scale()))
        elif self.spec.norm == "full":
            mixed = self.norm(mixed, self.layout.value_width, self._scale())
        if self.spec.gate == "none":
            return mixed
        return self.graph.mul(mixed, self.graph.activate(self.spec.gate, self.part.project("g_proj", x)))

    def _scale(self) -> str:
        return self.part.vector("heads.scale") if self.part.has("heads.scale") else ""


class RetentionGraph(HeadedGraph):
    """Retention, with one fixed decay for each head."""

    def recurrence(self, x: str) -> str:
        assert isinstance(self.spec, Retention)
        query, key, value = self.read(x)
        rates = log_decays(self.spec.decay, self.layout.heads, self.spec.decay_scale)
        ones = self.graph.node("Expand", self.batch.present(), self.graph.constant([1, 1, len(rates)]))
        decay = self.graph.mul(self.to_float32(ones), self.graph.constant(rates, np.float32))
        return self.recur(query if self.spec.norm == "full" else self.scaled(query), key, value, self.sizes, decay)


class GlaGraph(HeadedGraph):
    """Gated linear attention, with one decay for each channel of a key and token."""

    def recurrence(self, x: str) -> str:
        assert isinstance(self.spec, Gla)
        graph, (query, key, value) = self.graph, self.read(x)
        raw = key
        if self.spec.decay_from == "projection":
            raw = self.part.project("gk_proj_up", self.part.project("gk_proj_down", x))
        # log sigmoid(x) = -softplus(-x)
        decay = graph.mul(graph.softplus(graph.node("Neg", raw)), graph.number(-1.0 / self.spec.decay_divisor))
        if self.spec.activation == "softmax":
            apart = [self.apart(each, *self.sizes[:2]) for each in (query, key)]
            query, key = (self.together(graph.node("Softmax", each, axis=-1)) for each in apart)
        else:
            query = self.scaled(query)
        return self.recur(query, key, value, self.sizes, decay)


class Mamba2Graph(HeadedGraph):
    """Mamba-2, with one decay for each head and token."""

    def recurrence(self, x: str) -> str:
        assert isinstance(self.spec, Mamba2)
        graph, (query, key, value) = self.graph, self.read(x)
        step = graph.softplus(graph.add(self.part.project("dt_proj", x), self.part.vector("dt_bias")))
        decay = graph.mul(step, negative_exponential(self.part))
        apart = self.apart(value, self.layout.heads, self.layout.value_dim)
        unsqueezed = graph.node("Unsqueeze", step, graph.constant([3]))
        mixed = self.recur(query, key, self.together(graph.mul(apart, unsqueezed)), self.sizes, decay)
        skip = graph.node("Unsqueeze", self.part.vector("D"), graph.constant([1]))
        return graph.add(mixed, self.to_float32(self.together(graph.mul(apart, skip))))

    def finish(self, x: str, mixed: str) -> str:
        # The gate comes before the norm here.
        graph = self.graph
        if self.spec.gate != "none":
            mixed = graph.mul(mixed, graph.activate("silu", self.part.project("g_proj", x)))
        if not self.part.has("heads.scale"):
            return mixed
        groups = self.layout.q_heads
        apart = graph.reshape(mixed, 0, 0, groups, -1)
        normed = self.together(self.norm(apart, self.layout.value_width // groups))
        return graph.mul(normed, self.part.vector("heads.scale"))


class GatedDeltanetGraph(HeadedGraph):
    """Gated DeltaNet: the old value of a key is removed before the new one is written."""

    def recurrence(self, x: str) -> str:
        assert isinstance(self.spec, GatedDeltanet)
        graph, (query, key, value) = self.graph, self.read(x)
        beta = graph.node("Sigmoid", self.part.project("b_proj", x))
        query, key = self.scaled(self._unit(query)), self._unit(key)
        if not self.spec.decay:
            return self.recur(query, key, value, self.sizes, beta=self.masked(beta), rule="delta")
        raw = graph.softplus(graph.add(self.part.project("a_proj", x), self.part.vector("dt_bias")))
        decay = graph.mul(raw, negative_exponential(self.part))
        return self.recur(query, key, value, self.sizes, decay, self.masked(beta), rule="gated_delta")

    def _unit(self, states: str) -> str:
        """Returns heads of length one."""
        graph, apart = self.graph, self.apart(states, *self.sizes[:2])
        squares = graph.node("ReduceSum", graph.mul(apart, apart), graph.constant([-1]), keepdims=1)
        length = graph.node("Sqrt", graph.add(squares, graph.number(UNIT_EPS)))
        return self.together(graph.node("Div", apart, length))
