"""AdamW as this package uses it."""

import torch
from torch import nn

from refold.blueprint.recipe import HealStage

BETAS = (0.9, 0.95)
_FUSED = ("cpu", "cuda", "mps")


def make_optimizer(model: nn.Module, stage: HealStage) -> torch.optim.AdamW:
    """Makes AdamW over all parameters that require gradients; the learning rate is set anew at every step.

    Matrices decay, LoRA pairs among them; norms, biases and embeddings (with them a tied head) do not: a row of an
    embedding gets a gradient only when its token occurs, but would shrink at every step.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decaying: list[nn.Parameter] = []
    constant: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decaying if decays else constant).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": stage.weight_decay},
        {"params": constant, "weight_decay": 0.0},
    ]
    is_fused = all(parameter.device.type in _FUSED for parameter in decaying + constant)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=stage.learning_rate, betas=BETAS, fused=is_fused
    )
