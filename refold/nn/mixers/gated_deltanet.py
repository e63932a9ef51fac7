"""Gated delta rule: the state forgets what a key held before it writes there (arXiv 2412.06464, 2406.06484)."""

import torch
from torch import Tensor, nn

from refold.families.arch import ArchSpec
from refold.mixers.gated_deltanet import GatedDeltanet
from refold.nn.mixers.headed import HeadedMixer
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
        query, key, value = self._unit(query) * self.query_scale, self._unit(key), self.widen(value)
        beta, decay = self._rates(x, lora, vectors)
        return run(delta_rule, query, key, value, beta, decay, state=state, resets=resets)

    def write_matrix(
        self, x: Tensor, query: Tensor, key: Tensor, resets: Tensor | None, lora: Lora, vectors: OwnVectors
    ) -> Tensor:
        beta, decay = self._rates(x, lora, vectors)
        return delta_rule.matrix(self._unit(query) * self.query_scale, self._unit(key), beta, decay, resets)

    def finish(self, x: Tensor, mixed: Tensor, lora: Lora, vectors: OwnVectors) -> Tensor:
        # As in released models the gate is applied in float32, before rounding.
        if self.gate == "none" or not self.has_scale:
            return super().finish(x, mixed, lora, vectors)
        normed = self.normalise_heads(mixed, self.vector("heads.scale", vectors)).flatten(-2)
        gate = nn.functional.silu(self.project("g_proj", x, lora, vectors).float())
        return (normed.float() * gate).to(mixed.dtype)

    def _unit(self, states: Tensor) -> Tensor:
        """Heads of length one, repeated for the state's."""
        wide = self.widen(states).float()
        return wide * torch.rsqrt(wide.pow(2).sum(dim=-1, keepdim=True) + UNIT_EPS)

    def _rates(self, x: Tensor, lora: Lora, vectors: OwnVectors) -> tuple[Tensor, Tensor | None]:
        """How much is written, and log decays or None, `[B, T, H]`, float32."""
        beta = self.project("b_proj", x, lora, vectors).float().sigmoid()
        if not self.fades:
            return beta, None
        raw = self.project("a_proj", x, lora, vectors).float() + self.vector("dt_bias", vectors).float()
        return beta, -self.vector("A_log", vectors).float().exp() * nn.functional.softplus(raw)
