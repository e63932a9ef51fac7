"""Linear attention in a graph: feature maps, and a window of softmax beside them."""

import numpy as np
from onnx import TensorProto

from refold.exporting.onnx.attention import AttentionGraph
from refold.exporting.onnx.recurrent import RecurrentGraph
from refold.mixers.linear_attention import LinearAttention
from refold.nn.mixers.linear_attention import SMALLEST_SUM
from refold.ops.feature_maps import LARGEST_EXPONENT
from refold.ops.window import LOWEST


class LinearAttentionGraph(RecurrentGraph):
    """Attention by feature maps, in float32; with a normaliser, the last channel of a value is one, which sums weights.

    A window adds softmax over the latest tokens under the same normaliser. The keys and values of the window, and a
    one for each token, are kept as the inputs of a convolution are.
    """

    rule = "linear"

    def mix(self, x: str) -> str:
        assert isinstance(self.mixer, LinearAttention)
        graph, arch = self.graph, self.arch
        attention, root = AttentionGraph(self.part, self.batch), graph.number(arch.attention_scale**0.5)
        query = graph.mul(attention.finish("q", self.part.project("q_proj", x)), root)
        key, value = attention.read(x)
        key = graph.mul(key, root)
        mixed = self._mix_near_and_far(query, key, value) if self.mixer.window else self._mix_far(query, key, value)
        return self.part.project("o_proj", self.to_compute(mixed))

    def _mix_far(self, query: str, key: str, value: str) -> str:
        """Mixes by features alone."""
        assert isinstance(self.mixer, LinearAttention)
        graph, size = self.graph, self.arch.head_dim
        query, key = self._features(query, "q_map"), self._features(self._all_heads(key), "k_map")
        value = self.to_float32(self._all_heads(value))
        if not self.mixer.normalise:
            return self._recur_features(query, key, value, size)
        summed, weights = self._split_sums(self._recur_features(query, key, self._with_ones(value), size + 1))
        return self.together(graph.node("Div", summed, self._divisor(weights)))

    def _mix_near_and_far(self, query: str, key: str, value: str) -> str:
        """Mixes by softmax in the window and by features before it."""
        assert isinstance(self.mixer, LinearAttention)
        graph, window, width = self.graph, self.mixer.window, self.arch.num_key_value_heads * self.arch.head_dim
        kept = graph.concat((key, value, self.batch.present()), 2)
        every = self.behind_kept(kept, 2 * width + 1, window)
        keys, values, real = graph.split(graph.transpose(every, 0, 2, 1), [width, width, 1])
        keys, values, real = self._all_heads(keys), self.to_float32(self._all_heads(values)), self.to_float32(real)
        near, near_sum = self._sum_window(self.to_float32(query), self.to_float32(keys), values, real)
        # The features see the token that leaves the window: keys and values `window` tokens late.
        late, late_values, is_late = (self._first_tokens(each) for each in (keys, values, real))
        mapped = graph.mul(self._features(late, "k_map"), is_late)
        size = self.arch.head_dim + 1
        far = self._recur_features(self._features(query, "q_map"), mapped, self._with_ones(late_values), size)
        far, far_sum = self._split_sums(far)
        share = graph.node("Sigmoid", self.to_float32(self.part.vector("blend.share")))
        share = graph.node("Unsqueeze", share, graph.constant([1]))
        rest = graph.node("Sub", graph.constant(1.0, np.float32), share)
        summed = graph.add(graph.mul(near, share), graph.mul(far, rest))
        weights = graph.add(graph.mul(near_sum, share), graph.mul(far_sum, rest))
        return self.together(graph.node("Div", summed, self._divisor(weights)))

    def _sum_window(self, query: str, keys: str, values: str, real: str) -> tuple[str, str]:
        """Returns weighted values `[B, T, H, K]` and sums of weights; token t sees keys t + 1 to t + W."""
        assert isinstance(self.mixer, LinearAttention)
        graph, heads, size = self.graph, self.arch.num_attention_heads, self.arch.head_dim
        query, keys, values = (
            graph.transpose(self.apart(each, heads, size), 0, 2, 1, 3) for each in (query, keys, values)
        )
        scores = graph.node("MatMul", query, graph.transpose(keys, 0, 1, 3, 2))
        zero, one = graph.constant(0), graph.constant(1)
        tokens = graph.reshape(self.batch.num_tokens())
        own = graph.node("Unsqueeze", graph.node("Range", zero, tokens, one), graph.constant([1]))
        last = graph.add(own, graph.constant(self.mixer.window))
        place = graph.node("Range", zero, graph.add(tokens, graph.constant(self.mixer.window)), one)
        seen = graph.node("And", graph.node("Greater", place, own), graph.node("LessOrEqual", place, last))
        is_real = graph.cast(
            graph.node("Unsqueeze", graph.transpose(real, 0, 2, 1), graph.constant([1])), TensorProto.BOOL
        )
        lowest = graph.constant(LOWEST, np.float32)
        scores = graph.node("Where", graph.node("And", seen, is_real), scores, lowest)
        highest = graph.node("ReduceMax", scores, graph.constant([-1]), keepdims=1)
        weights = graph.node("Exp", graph.node("Sub", scores, highest))
        summed = graph.node("ReduceSum", weights, graph.constant([-1]), keepdims=1)
        near = graph.node("MatMul", weights, values)
        return graph.transpose(near, 0, 2, 1, 3), graph.transpose(summed, 0, 2, 1, 3)

    def _recur_features(self, query: str, key: str, value: str, value_size: int) -> str:
        assert isinstance(self.mixer, LinearAttention)
        sizes = self.arch.num_attention_heads, self.mixer.num_features, value_size
        return self.recur(query, key, value, sizes)

    def _all_heads(self, x: str) -> str:
        return self.widen(x, self.arch.num_key_value_heads, self.arch.num_attention_heads, self.arch.head_dim)

    def _first_tokens(self, x: str) -> str:
        """Returns the first T tokens of `[B, W + T, ...]`."""
        graph = self.graph
        return graph.node("Slice", x, graph.constant([0]), self.batch.num_tokens(), graph.constant([1]))

    def _with_ones(self, value: str) -> str:
        graph, heads, size = self.graph, self.arch.num_attention_heads, self.arch.head_dim
        one = graph.constant(1.0, np.float32)
        return self.together(graph.node("Pad", self.apart(value, heads, size), graph.constant([0] * 7 + [1]), one))

    def _split_sums(self, mixed: str) -> tuple[str, str]:
        """Returns weighted values `[B, T, H, K]` and sums of weights `[B, T, H, 1]`."""
        size = self.arch.head_dim
        summed, weights = self.graph.split(self.apart(mixed, self.arch.num_attention_heads, size + 1), [size, 1])
        return summed, weights

    def _divisor(self, weights: str) -> str:
        return self.graph.node("Max", weights, self.graph.constant(SMALLEST_SUM, np.float32))

    def _features(self, x: str, name: str) -> str:
        """Maps queries or keys `[B, T, H x K]` head by head (`ops/feature_maps.py`); float32."""
        assert isinstance(self.mixer, LinearAttention)
        graph, kind, x = self.graph, self.mixer.feature_map, self.to_float32(x)
        if kind == "elu":
            return graph.add(graph.node("Elu", x), graph.constant(1.0, np.float32))
        if kind == "relu":
            return graph.node("Relu", x)
        apart = graph.transpose(self.apart(x, self.arch.num_attention_heads, self.arch.head_dim), 0, 2, 1, 3)
        along = graph.node("MatMul", apart, self.to_float32(self.part.vector(f"{name}.weight")))
        if kind == "t2r":
            mapped = graph.node("Relu", along)
        elif kind == "hedgehog":
            mapped = graph.node("Softmax", graph.concat((along, graph.node("Neg", along)), 3), axis=-1)
        else:
            mapped = self._random_features(apart, along, name)
        return self.together(graph.transpose(mapped, 0, 2, 1, 3))

    def _random_features(self, x: str, along: str, name: str) -> str:
        assert isinstance(self.mixer, LinearAttention)
        graph = self.graph
        half, highest = graph.constant(0.5, np.float32), graph.constant(LARGEST_EXPONENT, np.float32)
        squares = graph.node("ReduceSum", graph.mul(x, x), graph.constant([-1]), keepdims=1)
        exponents = graph.node("Sub", along, graph.mul(squares, half))
        if self.part.has("map_weights.log"):
            logs = graph.mul(self.to_float32(self.part.vector("map_weights.log")), half)
            exponents = graph.add(exponents, graph.node("Unsqueeze", logs, graph.constant([1])))
        if name == "q_map" and self.mixer.normalise and not self.mixer.window:
            # A scale of a query's features cancels in the normaliser.
            largest = graph.node("ReduceMax", exponents, graph.constant([-1]), keepdims=1)
            exponents = graph.node("Sub", exponents, largest)
        else:
            exponents = graph.node("Min", exponents, highest)
        scale = graph.constant(self.mixer.num_features**-0.5, np.float32)
        return graph.mul(graph.node("Exp", exponents), scale)
