"""The optimizers of a stage: which weights decay, at which share of the learning rate each trains."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from refold.healing.groups import Trainable
from refold.healing.muon import Muon
from refold.modeling.depth import Depth, OwnedVectors
from refold.nn.part import StoredPart, Vectors
from refold.recipe.heal import HealStage

BETAS = (0.9, 0.95)
_FUSED = ("cpu", "cuda", "mps")


def make_optimizers(model: PreTrainedModel, stage: HealStage, trainable: Trainable) -> list[torch.optim.Optimizer]:
    """Makes the optimizers over all parameters that train at some time; the learning rate is set anew at every step.

    Matrices decay, LoRA pairs among them. Norms, biases, what else a blueprint calls vectors, and embeddings (with them
    a tied head) do not: a row of an embedding gets a gradient only when its token occurs, but would shrink at every
    step. With `muon` (Jordan et al., https://kellerjordan.github.io/posts/muon; scaled to AdamW's updates as in arXiv
    2502.16982) the matrices between embedding and head have it, and AdamW the rest.

    Args:
        model: the student.
        stage: optimizer and weight decay.
        trainable: what of the model trains.

    Returns:
        Optimizers whose parameter groups have, besides their own keys, `factor` on the learning rate and `thaws`,
        whether they are frozen at first.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head: Any = model.get_output_embeddings()
    outside = embeddings | {id(head.weight)}
    # Convolutions, decays and feature maps of mixers have several dimensions, but are no matrices of the stack.
    vectors = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (Vectors, OwnedVectors))
        for parameter in module.parameters()
    }
    parts = (module for module in model.modules() if isinstance(module, StoredPart))
    vectors |= {id(parameter) for part in parts for parameter in part.parameters(recurse=False)}
    # Nor is a prefix a matrix: its rows are like those of an embedding.
    vectors |= {id(depth.prefix) for depth in model.modules() if isinstance(depth, Depth)}
    grouped: dict[tuple[bool, bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in trainable.trained:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in vectors
            has_muon = stage.optimizer == "muon" and is_matrix and id(parameter) not in outside
            decays = is_matrix and id(parameter) not in embeddings
            key = (has_muon, decays, trainable.factors.get(name, 1.0), name in trainable.frozen_first)
            grouped.setdefault(key, []).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    for muon in (False, True):
        groups = [
            {
                "params": parameters,
                "weight_decay": stage.weight_decay if decays else 0.0,
                "factor": factor,
                "thaws": thaws,
            }
            for (has_muon, decays, factor, thaws), parameters in grouped.items()
            if has_muon == muon
        ]
        if groups and muon:
            optimizers.append(Muon(groups, lr=stage.learning_rate))
        elif groups:
            kinds = {parameter.device.type for group in groups for parameter in group["params"]}
            is_fused = kinds <= set(_FUSED)
            optimizers.append(torch.optim.AdamW(groups, lr=stage.learning_rate, betas=BETAS, fused=is_fused))
    return optimizers


def set_rates(optimizers: Iterable[torch.optim.Optimizer], rate: float, thawed: float) -> None:
    """Sets the learning rate of every group.

    Args:
        optimizers: from `make_optimizers`.
        rate: the stage's learning rate at this step.
        thawed: factor on it for weights that were frozen at first.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"] * (thawed if group["thaws"] else 1.0)


def freeze(model: nn.Module, trainable: Trainable, is_thawed: bool) -> None:
    """Makes exactly those parameters require gradients that train now."""
    for name, parameter in model.named_parameters():
        trains = name in trainable.trained and (is_thawed or name not in trainable.frozen_first)
        parameter.requires_grad_(trains)
