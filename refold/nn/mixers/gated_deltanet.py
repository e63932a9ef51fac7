"""Gated delta rule: the old value of a key is removed before the new one is written (arXiv 2412.06464, 2406.06484)."""

import torch
from torch import Tensor, nn

from refold.families.arch import ArchSpec
from refold.mixers.gated_deltanet import GatedDeltanet
from refold.nn.mixers.headed import HeadedMixer
from refold.nn.mixers.recurrent import HeadReads
from refold.nn.part import Lora, OwnVectors
from refold.ops import delta_rule
from refold.ops.choice import run

UNIT_EPS = 1e-6


class GatedDeltanetMixer(HeadedMixer):
    """Gated DeltaNet's weights with their norms."""

    def __init__(self, arch: ArchSpec, spec: GatedDeltanet, stores_vectors: bool):
        super().__init__(arch, spec, stores_vectors)
        self.fades = spec.decay

    def mix(
        self, reads: HeadReads, state: Tensor | None, resets: Tensor | None, lora: Lora, vectors: OwnVectors
    ) -> tuple[Tensor, Tensor]:
        query, key = self._unit(reads.query) * self.query_scale, self._unit(reads.key)
        value = self.widen(reads.value)
        beta, decay = self._rates(reads, lora, vectors)
        return run(delta_rule, query, key, value, beta, decay, state=state, resets=resets)

    def write_matrix(self, reads: HeadReads, resets: Tensor | None, lora: Lora, vectors: OwnVectors) -> Tensor:
        beta, decay = self._rates(reads, lora, vectors)
        query, key = self._unit(reads.query) * self.query_scale, self._unit(reads.key)
        return delta_rule.matrix(query, key, beta, decay, resets)

    def finish(self, reads: HeadReads, mixed: Tensor, lora: Lora, vectors: OwnVectors) -> Tensor:
        # As in released models the gate is applied in float32, before rounding.
        if self.gate == "none" or not self.has_scale:
            return super().finish(reads, mixed, lora, vectors)
        normed = self.normalise_heads(mixed, self.vector("heads.scale", vectors)).flatten(-2)
        gate = nn.functional.silu(self.project_read("g_proj", reads, lora, vectors).float())
        return (normed.float() * gate).to(mixed.dtype)

    def _unit(self, states: Tensor) -> Tensor:
        """Returns heads normalised to length one, repeated to the number of heads of the state."""
        wide = self.widen(states).float()
        return wide * torch.rsqrt(wide.pow(2).sum(dim=-1, keepdim=True) + UNIT_EPS)

    def _rates(self, reads: HeadReads, lora: Lora, vectors: OwnVectors) -> tuple[Tensor, Tensor | None]:
        """Returns write strengths, and log decays or None, `[B, T, H]`, float32."""
        beta = self.project_read("b_proj", reads, lora, vectors).float().sigmoid()
        if not self.fades:
            return beta, None
        raw = self.project_read("a_proj", reads, lora, vectors).float() + self.vector("dt_bias", vectors).float()
        return beta, -self.vector("A_log", vectors).float().exp() * nn.functional.softplus(raw)
