"""Mamba: a selective state-space model with a decay for each channel and state (arXiv 2312.00752)."""

from torch import Tensor, nn

from refold.families.arch import ArchSpec
from refold.mixers.mamba import Mamba
from refold.nn.mixers.context import MixerContext
from refold.nn.mixers.headed import RecurrentMixer
from refold.nn.mixers.memory import Memory, StateView
from refold.nn.part import Lora, OwnVectors
from refold.ops import selective_scan
from refold.ops.choice import is_single


class MambaMixer(RecurrentMixer):
    """Mamba's weights with the norms around them."""

    output_linear = "out_proj"

    def __init__(self, arch: ArchSpec, spec: Mamba, stores_vectors: bool):
        super().__init__(arch, spec, stores_vectors)
        self.sizes = spec.sizes

    def forward(
        self, hidden_states: Tensor, view: nn.Module, context: MixerContext, lora: Lora, vectors: OwnVectors
    ) -> Tensor:
        assert isinstance(view, StateView)
        memory = Memory(context.cache, view.layer_idx)
        normed = self.normalise("input_norm", hidden_states, vectors)
        inner = self.convolve(self.project("in_proj_x", normed, lora, vectors), context, memory, vectors)
        _, size, rank = self.sizes
        selected = self.project("x_proj", inner, lora, vectors)
        low, b, c = selected.split([rank, size, size], dim=-1)
        dt = nn.functional.softplus(self.project("dt_proj", low, lora, vectors).float())
        a = -self.vector("A_log", vectors).float().exp()
        state = memory.state()
        if is_single(inner, state, context.resets):
            y, state = selective_scan.step(inner[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state)
            y = y.unsqueeze(1)
        else:
            y, state = selective_scan.chunked(inner, dt, a, b, c, state, context.resets)
        memory.keep_state(state)
        y = y + inner * self.vector("D", vectors)
        y = y * nn.functional.silu(self.project("in_proj_z", normed, lora, vectors))
        return self.write(y.to(inner.dtype), lora, vectors)
