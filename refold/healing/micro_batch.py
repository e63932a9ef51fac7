"""How many sequences go through the student at once."""

from typing import Any

import torch

CPU_BYTES = 1 << 30
"""Activations on a CPU: beyond what a pass needs to keep the cores busy, more only misses the caches."""
GPU_SHARE = 0.25
"""Of a GPU's memory: weights, gradients and the optimizer's state need the rest."""


def choose_micro_batch(wish: int | None, context: int, config: Any, device: torch.device) -> int:
    """Returns the sequences of one forward pass.

    It does not look at the memory that happens to be free, so a run resumes with what it began with.

    Args:
        wish: what the stage asks for; None: what fits, by a rough count of the activations kept for the backward pass.
        context: tokens of one sequence.
        config: the student's, for its sizes.
        device: where it is.
    """
    if wish is not None:
        return wish
    budget = CPU_BYTES
    if device.type == "cuda":
        budget = int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    # In float32: norms, attention's inputs and outputs and residuals, then the MLP's inner states.
    per_token = 4 * config.num_hidden_layers * (16 * config.hidden_size + 5 * config.intermediate_size)
    return max(1, budget // (per_token * context))
