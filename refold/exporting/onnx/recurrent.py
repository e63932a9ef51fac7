"""The base of recurrent mixers in a graph: one operator runs the recurrence over all tokens of a call."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from onnx import TensorProto

from refold.exporting.onnx.batch_values import BatchValues
from refold.exporting.onnx.depth_part import DepthPart
from refold.exporting.onnx.graph import CONTRIB
from refold.mixers.spec import MixerSpec


class RecurrentGraph(ABC):
    """The recurrent mixer of one depth.

    The state `past.N.recurrent` [B, H, K, V] and the last inputs of a convolution `past.N.conv` [B, C, width - 1] are
    inputs of the graph; all zeros before the first token. Names and layouts are those of ONNX Runtime GenAI. Padding
    must be before the tokens of its row: there keys are zero and decays one, which leaves the state as it is.

    Args:
        part: The depth's mixer.
        batch: Values of all depths.
    """

    rule: ClassVar[str] = "gated"
    """Update rule of the operator `LinearAttention`: `linear`, `gated`, `delta` or `gated_delta`."""

    def __init__(self, part: DepthPart, batch: BatchValues):
        self.part, self.batch, self.graph = part, batch, part.graph
        self.index, self.arch = part.index, part.arch
        mixer = part.blueprint.depths[part.index].mixer
        assert mixer is not None
        self.mixer: MixerSpec = part.blueprint.mixers[mixer].mixer
        self._has_conv = False

    def run(self, hidden_states: str) -> str:
        """Adds the mixer and returns the update of the residual stream."""
        mixed = self.mix(self.part.normalise("input_norm", hidden_states))
        if not self._has_conv:
            # ONNX Runtime GenAI requires a state of this name at every depth with a recurrent state.
            past, present = self._add_conv_state(1, 1)
            self.graph.named_node("Identity", (past,), (present,))
        return self.part.normalise("output_norm", mixed)

    @abstractmethod
    def mix(self, x: str) -> str:
        """Adds everything between the norms around the mixer."""

    def recur(
        self,
        query: str,
        key: str,
        value: str,
        sizes: tuple[int, int, int],
        decay: str = "",
        beta: str = "",
        rule: str | None = None,
    ) -> str:
        """Runs the recurrence S = exp(decay) S + k v^T, out = S^T q over `[B, T, heads x size]`, with its state.

        Args:
            query: Scaled queries.
            key: Keys.
            value: Values.
            sizes: Number of heads, size of a key, size of a value.
            decay: Log decays `[B, T, H]` or `[B, T, H x K]`.
            beta: Write strengths `[B, T, H]` of the delta rule.
            rule: Another update rule than the mixer's.
        """
        heads, key_dim, value_dim = sizes
        shape = ["batch_size", heads, key_dim, value_dim]
        past, present = f"past.{self.index}.recurrent", f"present.{self.index}.recurrent"
        self.graph.add_input(past, TensorProto.FLOAT, shape)
        self.graph.add_output(present, TensorProto.FLOAT, shape)
        out = f"mixed.{self.index}"
        present_tokens = self.to_float32(self.batch.present())
        query, value = self.to_float32(query), self.to_float32(value)
        key = self.graph.mul(self.to_float32(key), present_tokens)
        if decay:
            decay = self.graph.mul(self.to_float32(decay), present_tokens)
        beta = self.to_float32(beta) if beta else ""
        attributes = {"q_num_heads": heads, "kv_num_heads": heads, "scale": 1.0, "update_rule": rule or self.rule}
        self.graph.named_node(
            "LinearAttention", (query, key, value, past, decay, beta), (out, present), CONTRIB, **attributes
        )
        return out

    def masked(self, x: str) -> str:
        """Sets `[B, T, ...]` to zero at padding."""
        return self.graph.mul(x, self.batch.present())

    def to_float32(self, x: str) -> str:
        return x if self.graph.compute == TensorProto.FLOAT else self.graph.cast(x, TensorProto.FLOAT)

    def to_compute(self, x: str) -> str:
        return x if self.graph.compute == TensorProto.FLOAT else self.graph.cast(x, self.graph.compute)

    def convolve(self, x: str, width: int, channels: int, activation: str) -> str:
        """Runs the short convolution over `[B, T, channels]`, with the inputs before this call."""
        graph = self.graph
        every = self.behind_kept(self.masked(x), channels, width - 1)
        weight = graph.node("Unsqueeze", self.part.vector("conv1d.weight"), graph.constant([1]))
        bias = self.part.vector("conv1d.bias") if self.part.has("conv1d.bias") else ""
        found = graph.node("Conv", every, weight, bias, group=channels, kernel_shape=[width])
        return graph.activate(activation, graph.transpose(found, 0, 2, 1))

    def behind_kept(self, x: str, channels: int, num_kept: int) -> str:
        """Returns `[B, T, channels]`, turned, behind the last inputs of earlier calls: `[B, channels, kept + T]`."""
        graph = self.graph
        turned = graph.transpose(x, 0, 2, 1)
        if not num_kept:
            return turned
        past, present = self._add_conv_state(channels, num_kept)
        every = graph.concat((past, turned), 2)
        end = graph.constant([np.iinfo(np.int64).max])
        graph.named_node("Slice", (every, graph.constant([-num_kept]), end, graph.constant([2])), (present,))
        return every

    def _add_conv_state(self, channels: int, kept: int) -> tuple[str, str]:
        self._has_conv = True
        past, present = f"past.{self.index}.conv", f"present.{self.index}.conv"
        for add, name in ((self.graph.add_input, past), (self.graph.add_output, present)):
            add(name, self.graph.compute, ["batch_size", channels, kept])
        return past, present

    def apart(self, x: str, heads: int, size: int) -> str:
        """Cuts `[B, T, heads x size]` into heads."""
        return self.graph.reshape(x, 0, 0, heads, size)

    def together(self, x: str) -> str:
        """Puts heads side by side again."""
        return self.graph.reshape(x, 0, 0, -1)

    def widen(self, x: str, heads: int, all_heads: int, size: int) -> str:
        """Repeats each of the heads of `[B, T, heads x size]` for all heads that use it."""
        if heads == all_heads:
            return x
        apart = self.graph.reshape(x, 0, 0, heads, 1, size)
        repeated = self.graph.node("Expand", apart, self.graph.constant([1, 1, 1, all_heads // heads, 1]))
        return self.together(repeated)

    def norm(self, x: str, size: int, weight: str = "") -> str:
        """Root-mean-square norm over the last axis of `size` numbers, with a weight if it is given."""
        weight = weight or self.graph.number([1.0] * size)
        return self.graph.node("RMSNormalization", x, weight, axis=-1, epsilon=self.arch.norm.eps)


def negative_exponential(part: DepthPart) -> str:
    """Returns -exp(A_log), computed at export."""
    name = part.stored("A_log")
    return part.weights.derived(f"{name}.rates", -torch.exp(part.weights.read(name)))
