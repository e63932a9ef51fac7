"""The model's outputs: those of transformers, and those of exits."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class StackOutput(BaseModelOutputWithPast):
    """Hidden states of the stack.

    Attributes:
        exit_hidden_states: `[B, T, D]` after the exit's norm, for each exit passed on the way, top to bottom.
        exit_gates: `[B, T]` gate logits of those exits, None for one without a gate; None if no exit has a gate.
    """

    exit_hidden_states: tuple[torch.Tensor, ...] | None = None
    exit_gates: tuple[torch.Tensor | None, ...] | None = None


@dataclass
class CausalOutput(CausalLMOutputWithPast):
    """Logits of the stack.

    Attributes:
        exit_logits: `[B, T, N]` for each exit passed on the way, top to bottom.
        exit_gates: As in `StackOutput`, at the positions that have logits.
    """

    exit_logits: tuple[torch.Tensor, ...] | None = None
    exit_gates: tuple[torch.Tensor | None, ...] | None = None
