"""All tensors a training run is made of, by name, out of the live objects and back into them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from refold.healing.team import Team

_MODEL, _OPTIMIZER, _RNG = "model.", "optimizer.", "rng."


def collect(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], team: Team) -> dict[str, Tensor]:
    """Returns parameters, optimizer state and the states of torch's random number generators, each whole.

    Every process of the team calls it; where weights are spread over them it gathers one after the other.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"{_MODEL}{name}"] = team.whole(parameter.detach())
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{_OPTIMIZER}{name}.{key}"] = team.whole(value)
    tensors[f"{_RNG}cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"{_RNG}cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts collected parameters back into a model that is not spread over a team yet."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"{_MODEL}{name}"])


def restore_optimizers(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor], team: Team
) -> None:
    """Puts back what belongs to the optimizers, made as they were when it was collected, and the generators."""
    owner = {
        id(parameter): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    unused = {name for name in tensors if name.startswith(_OPTIMIZER)}
    for name, parameter in model.named_parameters():
        prefix = f"{_OPTIMIZER}{name}."
        state = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
        if state:
            # Copied: the reader's tensors are views of the checkpoint's file.
            owner[id(parameter)].state[parameter] = {
                key: team.place(tensors[full].clone(), parameter) for key, full in state.items()
            }
        unused -= set(state.values())
    assert not unused, sorted(unused)
    torch.set_rng_state(tensors[f"{_RNG}cpu"].clone())
    if f"{_RNG}cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"{_RNG}cuda"].clone())
