"""Mamba-2: a state-space model with one decay for each head and token (arXiv 2405.21060)."""

import torch
from torch import Tensor, nn

from refold.nn.mixers.headed import HeadedMixer
from refold.nn.mixers.recurrent import HeadReads
from refold.nn.part import Lora, OwnVectors
from refold.ops import scalar_decay
from refold.ops.choice import run


class Mamba2Mixer(HeadedMixer):
    """Mamba-2 weights with their norms: queries, keys and values are the paper's C, B and x."""

    def mix(
        self, reads: HeadReads, state: Tensor | None, resets: Tensor | None, lora: Lora, vectors: OwnVectors
    ) -> tuple[Tensor, Tensor]:
        value = self.widen(reads.value)
        step, decay = self._discretise(reads, lora, vectors)
        key, query = self._shared(reads.key), self._shared(reads.query)
        written = value.float() * step.unsqueeze(-1)
        mixed, state = run(scalar_decay, query, key, written, decay, state=state, resets=resets)
        skip = self.vector("D", vectors).float().unsqueeze(-1)
        return (mixed + skip * value.float()).to(reads.x.dtype), state

    def write_matrix(self, reads: HeadReads, resets: Tensor | None, lora: Lora, vectors: OwnVectors) -> Tensor:
        step, decay = self._discretise(reads, lora, vectors)
        found = scalar_decay.matrix(self.widen(reads.query), self.widen(reads.key), decay, resets)
        found = found * step.transpose(1, 2).unsqueeze(2)
        skip = self.vector("D", vectors).float()
        return found + skip[:, None, None] * torch.eye(reads.x.shape[1], device=reads.x.device)

    def finish(self, reads: HeadReads, mixed: Tensor, lora: Lora, vectors: OwnVectors) -> Tensor:
        # The gate comes before the norm here.
        mixed = mixed.flatten(-2)
        if self.gate != "none":
            mixed = mixed * nn.functional.silu(self.project_read("g_proj", reads, lora, vectors).float())
        if self.has_scale:
            # Released models norm each group of heads by itself.
            groups = (self.layout.q_heads, -1)
            scale = self.vector("heads.scale", vectors).unflatten(0, groups)
            mixed = self.normalise_heads(mixed.unflatten(-1, groups), scale).flatten(-2)
        return mixed.to(reads.x.dtype)

    def _shared(self, states: Tensor) -> Tensor:
        """Returns queries or keys as they are if both have equally many heads, else repeated to the state's heads."""
        return states if self.layout.q_heads == self.layout.k_heads else self.widen(states)

    def _discretise(self, reads: HeadReads, lora: Lora, vectors: OwnVectors) -> tuple[Tensor, Tensor]:
        """Step sizes and log decays `[B, T, H]`, float32."""
        raw = self.project_read("dt_proj", reads, lora, vectors).float()
        step = nn.functional.softplus(raw + self.vector("dt_bias", vectors).float())
        return step, -step * self.vector("A_log", vectors).float().exp()
