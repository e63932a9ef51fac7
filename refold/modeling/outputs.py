"""What the model returns: transformers' outputs, with exits."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class StackOutput(BaseModelOutputWithPast):
    """Hidden states of the stack.

    Attributes:
        exit_hidden_states: `[B, T, D]` after the final norm, for each exit passed on the way, top to bottom.
    """

    exit_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class CausalOutput(CausalLMOutputWithPast):
    """Logits of the stack.

    Attributes:
        exit_logits: `[B, T, N]` for each exit passed on the way, top to bottom.
    """

    exit_logits: tuple[torch.Tensor, ...] | None = None
