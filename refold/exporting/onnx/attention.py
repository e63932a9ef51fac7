"""Softmax attention in a graph: one fused operator with a cache where that fits, plain operators elsewhere."""

from collections.abc import Mapping
from itertools import groupby

from refold.exporting.onnx.batch_values import BatchValues
from refold.exporting.onnx.depth_part import DepthPart
from refold.exporting.onnx.graph import CONTRIB
from refold.exporting.onnx.limits import is_fused
from refold.nn.mixers.key_values import KeyHeads

CachedKeys = Mapping[int, tuple[str, str]]
"""Depth to its keys and values `[B, heads, S, K]`, those of earlier calls included."""
KEPT = ("key", "value")


class AttentionGraph:
    """The attention of one depth.

    The fused operator is ONNX Runtime's GroupQueryAttention, which writes keys and values into a buffer that past and
    present may share. Rotation stands before it, and one additive mask has window and padding.

    Args:
        part: The depth's mixer.
        batch: Values of all depths.
    """

    def __init__(self, part: DepthPart, batch: BatchValues):
        self._part, self._batch, self._graph = part, batch, part.graph
        self._arch, self._index = part.arch, part.index
        self._depth = part.blueprint.depths[part.index]
        self._made = part.blueprint.made_heads(part.index)

    def run(self, hidden_states: str, cached: CachedKeys) -> tuple[str, tuple[str, str] | None]:
        """Adds the attention; returns the update of the residual stream, and the depth's keys and values."""
        x = self._part.normalise("input_norm", hidden_states)
        query = self.finish("q", self._part.project("q_proj", x))
        if is_fused(self._part.blueprint, self._index):
            heads, own = self._run_fused(query, x)
        else:
            own = self._append(x) if self._made else None
            heads = self._run_plain(query, *self._look_at(own, cached))
        return self._part.normalise("output_norm", self._part.project("o_proj", heads)), own

    def read(self, x: str) -> tuple[str, str]:
        """Returns keys, normed and rotated, and values, `[B, T, heads x K]`, of normed hidden states."""
        return self.finish("k", self._part.project("k_proj", x)), self._part.project("v_proj", x)

    def finish(self, name: str, states: str, is_rotated: bool = True) -> str:
        """Norms and rotates projected queries (`q`) or keys (`k`)."""
        heads = self._arch.num_attention_heads if name == "q" else self._arch.num_key_value_heads
        if self._arch.qk_norm == "full":
            states = self._part.normalise(f"{name}_norm", states)
        elif self._arch.qk_norm == "head":
            apart = self._graph.reshape(states, 0, 0, heads, self._arch.head_dim)
            states = self._graph.reshape(self._part.normalise(f"{name}_norm", apart), 0, 0, -1)
        rope = self._depth.rope
        return states if rope is None or not is_rotated else self._batch.rotate(states, rope, heads)

    def _run_fused(self, query: str, x: str) -> tuple[str, tuple[str, str]]:
        batch, arch = self._batch, self._arch
        key, value = self.read(x)
        past, present = self._cache()
        lengths = batch.last_places(), batch.total_length()
        bias = batch.bias(self._depth.window)
        heads = f"heads.{self._index}"
        self._graph.named_node(
            "GroupQueryAttention",
            (query, key, value, *past, *lengths, "", "", "", bias),
            (heads, *present),
            CONTRIB,
            num_heads=arch.num_attention_heads,
            kv_num_heads=arch.num_key_value_heads,
            scale=arch.attention_scale,
            softcap=arch.attention_softcap,
        )
        return heads, present

    def _append(self, x: str) -> tuple[str, str]:
        """Returns the keys and values that the depth makes, behind those of earlier calls."""
        past, present = self._cache()
        for states, before, after in zip(self.read(x), past, present, strict=True):
            apart = self._pick(self._heads_first(states), self._made)
            self._graph.named_node("Concat", (before, apart), (after,), axis=2)
        return present

    def _pick(self, states: str, heads: tuple[int, ...]) -> str:
        """Returns some heads of `[B, G, T, K]`."""
        if len(heads) == self._arch.num_key_value_heads:
            return states
        return self._graph.node("Gather", states, self._graph.constant(heads), axis=1)

    def _look_at(self, own: tuple[str, str] | None, cached: CachedKeys) -> tuple[str, str]:
        """Returns keys and values `[B, G, S, K]` of all heads in order, those of earlier depths included."""
        graph, heads = self._graph, KeyHeads(self._part.blueprint, self._index)
        places = (own, *(cached[source] for source in heads.sources))
        counts = (len(heads.made), *(len(self._part.blueprint.made_heads(source)) for source in heads.sources))
        found: list[str] = []
        for side in range(len(KEPT)):
            pieces: list[str] = []
            for place, picks in groupby(heads.picks, key=lambda pick: pick[0]):
                pair, indices = places[place], [index for _, index in picks]
                assert pair is not None
                piece = pair[side]
                if indices != list(range(counts[place])):
                    piece = graph.node("Gather", piece, graph.constant(indices), axis=1)
                pieces.append(piece)
            found.append(graph.concat(pieces, 1))
        return found[0], found[1]

    def _run_plain(self, query: str, key: str, value: str) -> str:
        """Returns the heads side by side; queries are grouped by the key head that they read."""
        graph, arch, bias = self._graph, self._arch, self._batch.bias(self._depth.window)
        groups = arch.num_key_value_heads
        times = arch.num_attention_heads // groups
        if self._depth.prefix:
            key, value, bias = self._put_prefix_before(key, value, bias)
        grouped = graph.transpose(graph.reshape(query, 0, 0, groups, times, arch.head_dim), 0, 2, 3, 1, 4)
        scores = graph.node("MatMul", graph.reshape(grouped, 0, groups, -1, arch.head_dim), self._turned(key))
        scores = graph.mul(scores, graph.number(arch.attention_scale))
        if arch.attention_softcap is not None:
            scores = graph.soft_cap(scores, arch.attention_softcap)
        # [B, G, times x T, S] and back, so that the mask of all heads can be added.
        rows = graph.node("Shape", scores)
        seen = graph.concat((self._batch.num_rows(), graph.constant([-1]), self._batch.num_tokens()), 0)
        apart = graph.concat((seen, graph.cut(rows, 3, 4, 0)), 0)
        masked = graph.add(graph.node("Reshape", scores, apart), bias)
        weights = graph.node("Reshape", graph.node("Softmax", masked, axis=-1), rows)
        mixed = graph.node("MatMul", weights, value)
        split = graph.concat((seen, graph.constant([arch.head_dim])), 0)
        return graph.reshape(graph.transpose(graph.node("Reshape", mixed, split), 0, 2, 1, 3), 0, 0, -1)

    def _put_prefix_before(self, key: str, value: str, bias: str) -> tuple[str, str, str]:
        """Puts the depth's prefix, which every token sees, before keys and values."""
        graph = self._graph
        prefix = self._part.weights.vector(f"model.depths.{self._index}.prefix")
        x = graph.node("Unsqueeze", prefix, graph.constant([0]))
        own = self.finish("k", self._part.project("k_proj", x), is_rotated=False), self._part.project("v_proj", x)
        spread = graph.concat((self._batch.num_rows(), graph.constant([1, 1, 1])), 0)
        found = [
            graph.concat((graph.node("Expand", self._heads_first(states), spread), after), 2)
            for states, after in zip(own, (key, value), strict=True)
        ]
        pads = graph.constant([0, 0, 0, self._depth.prefix, 0, 0, 0, 0])
        return found[0], found[1], graph.node("Pad", bias, pads)

    def _heads_first(self, states: str) -> str:
        apart = self._graph.reshape(states, 0, 0, self._arch.num_key_value_heads, self._arch.head_dim)
        return self._graph.transpose(apart, 0, 2, 1, 3)

    def _turned(self, key: str) -> str:
        return self._graph.transpose(key, 0, 1, 3, 2)

    def _cache(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Adds the inputs and outputs that keep keys and values, and returns their names."""
        heads, size, graph = len(self._made), self._arch.head_dim, self._graph
        past, present = ([f"{place}.{self._index}.{kind}" for kind in KEPT] for place in ("past_key_values", "present"))
        for name in past:
            graph.add_input(name, graph.compute, ["batch_size", heads, "past_sequence_length", size])
        for name in present:
            graph.add_output(name, graph.compute, ["batch_size", heads, "total_sequence_length", size])
        return (past[0], past[1]), (present[0], present[1])
