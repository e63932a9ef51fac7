"""The stored MLP: down(act(gate x) * up x) (arXiv 2002.05202), or down(act(up x))."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.activations import ACT2FN

from refold.families.arch import ArchSpec
from refold.mixers.spec import MLP
from refold.nn.packed import PackedPart
from refold.nn.part import Lora, OwnVectors, StoredPart
from refold.nn.workshop import Workshop


class Mlp(StoredPart):
    """An MLP with its norms, run by one or more depths."""

    input_groups = (("up_proj", "gate_proj"),)

    def __init__(self, arch: ArchSpec, stores_vectors: bool):
        super().__init__(MLP.linears(arch), MLP.vectors(arch), arch.norm, stores_vectors)
        self.activation = ACT2FN[arch.activation]
        self._activate: Callable[[Tensor], Tensor] | None = None
        self.gated = arch.gated_mlp

    def forward(self, hidden_states: Float[Tensor, "B T D"], lora: Lora, vectors: OwnVectors) -> Float[Tensor, "B T D"]:
        """Returns the update of the residual stream."""
        return self.transform(hidden_states, lora, vectors)

    def transform(self, hidden_states: Tensor, lora: Lora, vectors: OwnVectors) -> Tensor:
        x = self.normalise("input_norm", hidden_states, vectors)
        activate = self._activate or self.activation
        if self.gated:
            up, gate = self.project_all(("up_proj", "gate_proj"), x, lora, vectors)
            inner = activate(gate) * up
        else:
            inner = activate(self.project("up_proj", x, lora, vectors))
        y = self.project("down_proj", inner, lora, vectors)
        return self.normalise("output_norm", y, vectors)

    def pack(self, workshop: Workshop, format: str) -> PackedPart:
        # A call through a module costs as much as the activation of one row.
        self._activate = self.activation.forward
        return super().pack(workshop, format)

    def compile_regions(self) -> None:
        self.transform = torch.compile(self.transform)
