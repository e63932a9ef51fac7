"""Mamba: a selective state-space model with a decay for each channel and state (arXiv 2312.00752)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from refold.families.arch import ArchSpec
from refold.mixers.mamba import Mamba
from refold.nn.mixers.batch import DepthInputs
from refold.nn.mixers.headed import RecurrentMixer
from refold.nn.part import Lora, OwnVectors
from refold.ops.choice import run_selective


@dataclass(frozen=True)
class Selected:
    """The inputs of the scan.

    Attributes:
        gate: Projected from the normed hidden states.
        inner: Convolved inputs, the paper's x.
        dt: Step sizes, float32.
        b: The paper's B.
        c: The paper's C.
    """

    gate: Float[Tensor, "B T C"]
    inner: Float[Tensor, "B T C"]
    dt: Float[Tensor, "B T C"]
    b: Float[Tensor, "B T N"]
    c: Float[Tensor, "B T N"]


class MambaMixer(RecurrentMixer):
    """Mamba's weights with the norms around them."""

    output_linear = "out_proj"
    input_groups = (("in_proj_x", "in_proj_z"),)

    def __init__(self, arch: ArchSpec, spec: Mamba, stores_vectors: bool):
        super().__init__(arch, spec, stores_vectors)
        self.sizes = spec.sizes

    def read_inputs(self, hidden_states: Tensor, inputs: DepthInputs, lora: Lora, vectors: OwnVectors) -> Selected:
        normed = self.normalise("input_norm", hidden_states, vectors)
        inner, gate = self.project_all(("in_proj_x", "in_proj_z"), normed, lora, vectors)
        inner = self.convolve(inner, inputs, vectors)
        _, size, rank = self.sizes
        low, b, c = self.project("x_proj", inner, lora, vectors).split([rank, size, size], dim=-1)
        dt = nn.functional.softplus(self.project("dt_proj", low, lora, vectors).float())
        return Selected(gate, inner, dt, b, c)

    def mix(
        self, reads: Selected, state: Tensor | None, resets: Tensor | None, lora: Lora, vectors: OwnVectors
    ) -> tuple[Tensor, Tensor]:
        a = -self.vector("A_log", vectors).float().exp()
        return run_selective(reads.inner, reads.dt, a, reads.b, reads.c, state, resets)

    def finish(self, reads: Selected, mixed: Tensor, lora: Lora, vectors: OwnVectors) -> Tensor:
        y = mixed + reads.inner * self.vector("D", vectors)
        y = y * nn.functional.silu(reads.gate)
        return y.to(reads.inner.dtype)
