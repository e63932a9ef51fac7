"""The stored MLP: down(act(gate x) * up x) (arXiv 2002.05202), or down(act(up x))."""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.activations import ACT2FN

from refold.families.arch import ArchSpec
from refold.mixers.spec import MLP
from refold.nn.part import Lora, OwnVectors, StoredPart


class Mlp(StoredPart):
    """An MLP with its norms, run by one or more depths."""

    def __init__(self, arch: ArchSpec, stores_vectors: bool):
        super().__init__(MLP.linears(arch), MLP.vectors(arch), arch.norm, stores_vectors)
        self.activation = ACT2FN[arch.activation]
        self.gated = arch.gated_mlp

    def forward(self, hidden_states: Float[Tensor, "B T D"], lora: Lora, vectors: OwnVectors) -> Float[Tensor, "B T D"]:
        """Returns the update of the residual stream."""
        return self.transform(hidden_states, lora, vectors)

    def transform(self, hidden_states: Tensor, lora: Lora, vectors: OwnVectors) -> Tensor:
        x = self.normalise("input_norm", hidden_states, vectors)
        up = self.project("up_proj", x, lora, vectors)
        inner = self.activation(self.project("gate_proj", x, lora, vectors)) * up if self.gated else self.activation(up)
        y = self.project("down_proj", inner, lora, vectors)
        return self.normalise("output_norm", y, vectors)

    def compile_regions(self) -> None:
        self.transform = torch.compile(self.transform)
