"""Gated linear attention: every channel of the keys fades at its own rate (arXiv 2312.06635; Liger: 2503.01496)."""

import torch
from torch import Tensor, nn

from refold.families.arch import ArchSpec
from refold.mixers.gla import Gla
from refold.nn.mixers.headed import HeadedMixer
from refold.nn.part import Lora, OwnVectors
from refold.ops import channel_decay
from refold.ops.choice import run


class GlaMixer(HeadedMixer):
    """Gated linear attention's weights with their norms."""

    def __init__(self, arch: ArchSpec, spec: Gla, stores_vectors: bool):
        super().__init__(arch, spec, stores_vectors)
        self.activation, self.decay_from, self.decay_divisor = spec.activation, spec.decay_from, spec.decay_divisor

    def mix(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: Tensor | None,
        resets: Tensor | None,
        lora: Lora,
        vectors: OwnVectors,
    ) -> tuple[Tensor, Tensor]:
        decay = self._decays(x, key, lora, vectors)
        query, key, value = *self._activate(query, key), self.widen(value)
        return run(channel_decay, query, key, value, decay, state=state, resets=resets)

    def write_matrix(
        self, x: Tensor, query: Tensor, key: Tensor, resets: Tensor | None, lora: Lora, vectors: OwnVectors
    ) -> Tensor:
        decay = self._decays(x, key, lora, vectors)
        return channel_decay.matrix(*self._activate(query, key), decay, resets)

    def _activate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.widen(query), self.widen(key)
        if self.activation == "softmax":
            return query.softmax(dim=-1, dtype=torch.float32), key.softmax(dim=-1, dtype=torch.float32)
        return query * self.query_scale, key

    def _decays(self, x: Tensor, key: Tensor, lora: Lora, vectors: OwnVectors) -> Tensor:
        """Log decays `[B, T, H, K]`, float32."""
        if self.decay_from == "keys":
            # Liger pools the keys to the gates' size; keys that have it already are their own pool.
            raw = self.widen(key)
        else:
            raw = self.project("gk_proj_up", self.project("gk_proj_down", x, lora, vectors), lora, vectors)
            raw = raw.unflatten(-1, (-1, self.layout.key_dim))
        return nn.functional.logsigmoid(raw.float()) / self.decay_divisor
