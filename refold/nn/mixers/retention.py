"""Retention: linear attention whose state fades at a fixed rate for each head (arXiv 2307.08621)."""

import math

import torch
from torch import Tensor

from refold.families.arch import ArchSpec
from refold.mixers.retention import Retention
from refold.nn.mixers.headed import HeadedMixer
from refold.nn.mixers.recurrent import HeadReads
from refold.nn.part import Lora, OwnVectors
from refold.ops import scalar_decay
from refold.ops.choice import run


def log_decays(kind: str, heads: int, scale: float) -> list[float]:
    """Returns the logarithm of the factor by which each head multiplies its state at each token.

    Args:
        kind: `retnet`: factor 1 - 2^(-5-h); `slopes`: exp(-2^(-8(h+1)/H)) (lightning attention, arXiv 2401.04658).
        heads: H.
        scale: Factor on the logarithms.
    """
    if kind == "retnet":
        return [scale * math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]
    return [-scale * 2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)]


class RetentionMixer(HeadedMixer):
    """Retention weights with their norms; with slopes, activations and a full norm this is lightning attention."""

    def __init__(self, arch: ArchSpec, spec: Retention, stores_vectors: bool):
        super().__init__(arch, spec, stores_vectors)
        self.log_decay = log_decays(spec.decay, self.layout.heads, spec.decay_scale)
        if spec.norm == "full":
            # Lightning attention leaves queries as they are.
            self.query_scale = 1.0

    def mix(
        self, reads: HeadReads, state: Tensor | None, resets: Tensor | None, lora: Lora, vectors: OwnVectors
    ) -> tuple[Tensor, Tensor]:
        query, key = self.widen(reads.query) * self.query_scale, self.widen(reads.key)
        value, decay = self.widen(reads.value), torch.tensor(self.log_decay, device=query.device)
        return run(scalar_decay, query, key, value, decay, state=state, resets=resets)

    def write_matrix(self, reads: HeadReads, resets: Tensor | None, lora: Lora, vectors: OwnVectors) -> Tensor:
        query, key = self.widen(reads.query) * self.query_scale, self.widen(reads.key)
        return scalar_decay.matrix(query, key, torch.tensor(self.log_decay, device=query.device), resets)
