"""The optimizers of a stage: parameter groups by weight decay and by factor on the learning rate."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from refold.blueprint.tensors import target_tensors
from refold.healing.groups import Trainable
from refold.healing.muon import Muon
from refold.modeling.model import RefoldForCausalLM
from refold.recipe.heal import HealStage

BETAS = (0.9, 0.95)
_FUSED = ("cpu", "cuda", "mps")


def make_optimizers(model: PreTrainedModel, stage: HealStage, trainable: Trainable) -> list[torch.optim.Optimizer]:
    """Makes the optimizers of all parameters that train at some time. The loop sets the learning rate at every step.

    Matrices decay, also LoRA pairs. Norms, biases and other vectors, prefixes, and embeddings (with a tied head) do
    not: a row of an embedding gets a gradient only when its token occurs, but decay would shrink it at every step. In a
    folded model the kind of a tensor tells whether it decays. With `muon` (Jordan et al.,
    https://kellerjordan.github.io/posts/muon; scaled to AdamW's updates as in arXiv 2502.16982) Muon trains the
    matrices between embedding and head, and AdamW trains the rest.

    Args:
        model: the student.
        stage: optimizer and weight decay.
        trainable: the weights that train.

    Returns:
        Optimizers. Their parameter groups have two more keys: `factor`, a factor on the learning rate, and `thaws`,
        whether the weights are frozen at first.
    """
    matrices, decaying = _matrices_and_decaying(model)
    grouped: dict[tuple[bool, bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in trainable.trained:
            has_muon = stage.optimizer == "muon" and name in matrices
            key = (has_muon, name in decaying, trainable.factors.get(name, 1.0), name in trainable.frozen_first)
            grouped.setdefault(key, []).append(parameter)
    rate = stage.learning_rate or 0.0  # until the first step sets it
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
            optimizers.append(Muon(groups, lr=rate))
        elif groups:
            kinds = {parameter.device.type for group in groups for parameter in group["params"]}
            is_fused = kinds <= set(_FUSED)
            optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=is_fused))
    return optimizers


def _matrices_and_decaying(model: PreTrainedModel) -> tuple[frozenset[str], frozenset[str]]:
    """Returns the matrices between embedding and head, and all weights that decay."""
    if isinstance(model, RefoldForCausalLM):
        tensors = list(target_tensors(model.config.read_blueprint()))
        return (
            frozenset(each.name for each in tensors if each.kind.is_matrix(each)),
            frozenset(each.name for each in tensors if each.kind.decays(each)),
        )
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head: Any = model.get_output_embeddings()
    wide = [(name, each) for name, each in model.named_parameters() if each.ndim >= 2 and id(each) not in embeddings]
    return frozenset(name for name, each in wide if each is not head.weight), frozenset(name for name, _ in wide)


def set_rates(optimizers: Iterable[torch.optim.Optimizer], rate: float, thawed: float) -> None:
    """Sets the learning rate of every group.

    Args:
        optimizers: from `make_optimizers`.
        rate: the stage's learning rate at this step.
        thawed: factor on the rate of weights that were frozen at first.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"] * (thawed if group["thaws"] else 1.0)


def freeze(model: nn.Module, trainable: Trainable, is_thawed: bool) -> None:
    """Sets `requires_grad` of every parameter: true if the parameter trains now."""
    for name, parameter in model.named_parameters():
        trains = name in trainable.trained and (is_thawed or name not in trainable.frozen_first)
        parameter.requires_grad_(trains)
