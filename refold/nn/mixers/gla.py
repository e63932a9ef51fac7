"""Gated linear attention: every channel of the keys fades at its own rate (arXiv 2312.06635; Liger: 2503.01496)."""

import torch
from torch import Tensor, nn

from refold.families.arch import ArchSpec
from refold.mixers.gla import Gla
from refold.nn.mixers.headed import HeadedMixer
from refold.nn.mixers.recurrent import HeadReads
from refold.nn.part import Lora, OwnVectors
from refold.ops import channel_decay
from refold.ops.choice import run


class GlaMixer(HeadedMixer):
    """Gated linear attention's weights with their norms."""

    def __init__(self, arch: ArchSpec, spec: Gla, stores_vectors: bool):
        super().__init__(arch, spec, stores_vectors)
        self.activation, self.decay_from, self.decay_divisor = spec.activation, spec.decay_from, spec.decay_divisor

    def mix(
        self, reads: HeadReads, state: Tensor | None, resets: Tensor | None, lora: Lora, vectors: OwnVectors
    ) -> tuple[Tensor, Tensor]:
        decay = self._decays(reads, lora, vectors)
        query, key, value = *self._activate(reads), self.widen(reads.value)
        return run(channel_decay, query, key, value, decay, state=state, resets=resets)

    def write_matrix(self, reads: HeadReads, resets: Tensor | None, lora: Lora, vectors: OwnVectors) -> Tensor:
        decay = self._decays(reads, lora, vectors)
        return channel_decay.matrix(*self._activate(reads), decay, resets)

    def _activate(self, reads: HeadReads) -> tuple[Tensor, Tensor]:
        query, key = self.widen(reads.query), self.widen(reads.key)
        if self.activation == "softmax":
            return query.softmax(dim=-1, dtype=torch.float32), key.softmax(dim=-1, dtype=torch.float32)
        return query * self.query_scale, key

    def _decays(self, reads: HeadReads, lora: Lora, vectors: OwnVectors) -> Tensor:
        """Log decays `[B, T, H, K]`, float32."""
        if self.decay_from == "keys":
            # Liger pools the keys to the gates' size; keys that have it already are their own pool.
            raw = self.widen(reads.key)
        else:
            raw = self.project("gk_proj_up", self.project_read("gk_proj_down", reads, lora, vectors), lora, vectors)
            raw = raw.unflatten(-1, (-1, self.layout.key_dim))
        return nn.functional.logsigmoid(raw.float()) / self.decay_divisor
