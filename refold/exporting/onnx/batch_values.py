"""The values that all depths of a graph share: rotations, masks and lengths. Each is computed when first needed."""

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import TensorProto

from refold.exporting.onnx.graph import GraphBuilder
from refold.families.arch import ArchSpec, Rope
from refold.nn.rotary import inverse_frequencies

LOWEST: Mapping[int, float] = {
    TensorProto.FLOAT: float(np.finfo(np.float32).min),
    TensorProto.FLOAT16: float(np.finfo(np.float16).min) / 2,
}
"""Added to the score of a masked key. The sum must not be minus infinity: a row of padding has no other scores, and its
softmax would be NaN. In float16 the lowest number plus a score of -16 would be."""


class BatchValues:
    """Inputs of the graph, and values computed from them.

    Letters: B rows, T tokens of this call, S tokens with those of earlier calls.

    Args:
        graph: The graph, which gets `input_ids` [B, T], `attention_mask` [B, S] and `position_ids` [B, T].
        arch: The architecture.
    """

    def __init__(self, graph: GraphBuilder, arch: ArchSpec):
        self._graph, self._arch = graph, arch
        tokens, whole = ["batch_size", "sequence_length"], ["batch_size", "total_sequence_length"]
        self.input_ids = graph.add_input("input_ids", TensorProto.INT64, tokens)
        self.attention_mask = graph.add_input("attention_mask", TensorProto.INT64, whole)
        self.position_ids = graph.add_input("position_ids", TensorProto.INT64, tokens)
        self._made: dict[object, str] = {}
        self._rotations: dict[Rope, tuple[str, str]] = {}

    def num_tokens(self) -> str:
        """T as a vector of one number."""
        return self._once("tokens", lambda: self._graph.node("Shape", self.input_ids, start=1, end=2))

    def num_keys(self) -> str:
        """S as a vector of one number."""
        return self._once("keys", lambda: self._graph.node("Shape", self.attention_mask, start=1, end=2))

    def num_rows(self) -> str:
        """B as a vector of one number."""
        return self._once("rows", lambda: self._graph.node("Shape", self.input_ids, start=0, end=1))

    def total_length(self) -> str:
        """S as a number, int32."""
        return self._once("total", lambda: self._graph.reshape(self._to_int32(self.num_keys())))

    def last_places(self) -> str:
        """S - 1 for each row, int32: the place of the last key."""

        def make() -> str:
            last = self._graph.node("Sub", self.num_keys(), self._graph.constant([1]))
            return self._to_int32(self._graph.node("Expand", last, self.num_rows()))

        return self._once("last", make)

    def bias(self, window: int | None) -> str:
        """The mask added to scores `[B, 1, T, S]`: 0 at keys that a token sees, a very low number at others."""
        return self._once(("bias", window), lambda: self._make_bias(window))

    def present(self) -> str:
        """1 at tokens and 0 at padding, `[B, T, 1]`, of this call."""

        def make() -> str:
            graph = self._graph
            place, end = graph.node("Sub", self.num_keys(), self.num_tokens()), self.num_keys()
            latest = graph.node("Slice", self.attention_mask, place, end, graph.constant([1]))
            return graph.node("Unsqueeze", graph.cast(latest, graph.compute), graph.constant([2]))

        return self._once("present", make)

    def rotate(self, x: str, rope: Rope, num_heads: int) -> str:
        """Rotates queries or keys `[B, T, num_heads x head size]`."""
        if rope not in self._rotations:
            self._rotations[rope] = self._make_rotation(rope)
        cos, sin = self._rotations[rope]
        return self._graph.node(
            "RotaryEmbedding", x, cos, sin, num_heads=num_heads, rotary_embedding_dim=rope.rotary_dim
        )

    def _make_rotation(self, rope: Rope) -> tuple[str, str]:
        """Returns cosines and sines `[B, T, half]`; angles are float32."""
        graph, positions = self._graph, self._arch.max_position_embeddings
        places = graph.node("Unsqueeze", graph.cast(self.position_ids, TensorProto.FLOAT), graph.constant([2]))
        found, factor = inverse_frequencies(rope, positions)
        if rope.kind == "dynamic":
            frequencies = self._stretched(rope, places)
        else:
            frequencies = graph.constant(found.numpy(), np.float32)
        angles = graph.mul(places, frequencies)
        turned = [graph.node(name, angles) for name in ("Cos", "Sin")]
        if factor != 1.0:
            turned = [graph.mul(each, graph.constant(factor, np.float32)) for each in turned]
        cos, sin = (each if graph.compute == TensorProto.FLOAT else graph.cast(each, graph.compute) for each in turned)
        return cos, sin

    def _stretched(self, rope: Rope, places: str) -> str:
        """Returns inverse frequencies of kind `dynamic`, which depend on the length of the text (`nn/rotary.py`)."""
        graph, size, factor = self._graph, rope.rotary_dim, rope.scaling["factor"]
        limit = self._arch.max_position_embeddings

        def number(value: float | Sequence[float] | np.ndarray) -> str:
            return graph.constant(value, np.float32)

        length = graph.add(graph.node("ReduceMax", places, keepdims=0), number(1.0))
        relative = graph.node("Max", graph.mul(length, number(1.0 / limit)), number(1.0))
        grown = graph.node("Sub", graph.mul(relative, number(factor)), number(factor - 1.0))
        base = graph.mul(graph.node("Pow", grown, number(size / (size - 2))), number(rope.theta))
        exponents = -np.arange(0, size, 2, dtype=np.float32) / size
        return graph.node("Pow", base, number(exponents))

    def _make_bias(self, window: int | None) -> str:
        graph = self._graph
        zero, one = graph.constant(0), graph.constant(1)
        keys = graph.node("Range", zero, graph.reshape(self.num_keys()), one)
        first = graph.node("Sub", self.num_keys(), self.num_tokens())
        own = graph.add(graph.node("Range", zero, graph.reshape(self.num_tokens()), one), first)
        own = graph.node("Unsqueeze", own, graph.constant([1]))
        seen = graph.node("LessOrEqual", keys, own)
        if window is not None:
            near = graph.node("Greater", keys, graph.node("Sub", own, graph.constant(window)))
            seen = graph.node("And", seen, near)
        real = graph.node("Unsqueeze", graph.cast(self.attention_mask, TensorProto.BOOL), graph.constant([1, 2]))
        lowest = graph.number(LOWEST[graph.compute])
        return graph.node("Where", graph.node("And", seen, real), graph.number(0.0), lowest)

    def _to_int32(self, x: str) -> str:
        return self._graph.cast(x, TensorProto.INT32)

    def _once(self, key: object, make) -> str:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
