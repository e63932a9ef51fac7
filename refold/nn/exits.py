"""The parts of an early exit: a norm, a LoRA on the shared head, a gate."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.blueprint.schema import Exit
from refold.families.arch import ArchSpec
from refold.nn.lora import Adapter, LoraPairs, Pair
from refold.nn.norms import StackNorm


class HeadLora(LoraPairs):
    """The LoRA on the shared head that one exit uses."""

    def __init__(self, rank: int, hidden_size: int, vocab_size: int):
        super().__init__({"lm_head": (rank, hidden_size, vocab_size)})

    @property
    def pair(self) -> Pair:
        """Returns both factors."""
        return self()["lm_head"]

    def adapt(
        self, logits: Float[Tensor, "*batch N"], hidden_states: Float[Tensor, "*batch D"]
    ) -> Float[Tensor, "*batch N"]:
        """Adds B (A x) to the logits of the shared head."""
        return Adapter(self.pair).apply(logits, hidden_states)

    @torch.no_grad()
    def resize(self, vocab_size: int) -> None:
        """Cuts B to `vocab_size` tokens, or adds zeros for new ones, whose logits are then the shared head's."""
        b = cast("nn.Parameter", self.pair[1])
        kept = b[:vocab_size]
        resized = kept.new_zeros(vocab_size, kept.shape[1])
        resized[: len(kept)] = kept
        self.register_parameter("lm_head.b", nn.Parameter(resized, requires_grad=b.requires_grad))


class Gate(nn.Module):
    """Predicts whether an exit's likeliest token is that of the full depth: `sigmoid(w x + b)`, one half at first.

    It reads detached hidden states, so that training it moves nothing below. Its own class rather than `nn.Linear`,
    so that tools that quantise linears leave this single row alone.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def reset(self) -> None:
        """Initialises the gate: one half for every token."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_states: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        """Returns logits for normed hidden states of the exit."""
        return nn.functional.linear(hidden_states.detach(), self.weight, self.bias).squeeze(-1)


class ExitParts(nn.Module):
    """Everything stored for one exit alone, under the names that `exit_tensors` gives.

    Attributes:
        norm: None where the exit uses the final norm.
        lora: On the head; None where the exit uses the head as it is.
        gate: None where there is none.
    """

    def __init__(self, arch: ArchSpec, spec: Exit):
        super().__init__()
        self.norm = StackNorm(arch.norm, arch.hidden_size) if spec.norm == "own" else None
        self.lora = HeadLora(spec.head_rank, arch.hidden_size, arch.vocab_size) if spec.head_rank else None
        self.gate = Gate(arch.hidden_size) if spec.gate else None
