"""The tensors of a training run by name: collected for a checkpoint, and restored from it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from refold.healing.team import Team

_MODEL, _OPTIMIZER, _RNG = "model.", "optimizer.", "rng."


def collect(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], team: Team) -> dict[str, Tensor]:
    """Returns parameters, optimizer state and the states of torch's random number generators, not sharded.

    Every process of the team must call it; sharded weights are gathered one after another.
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
    """Restores collected parameters of a model that is not yet sharded."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"{_MODEL}{name}"])


def restore_optimizers(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor], team: Team
) -> None:
    """Restores the state of the optimizers, which must be made with the same settings, and of the generators."""
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
            # The tensors are copied, because the reader's tensors are views of the checkpoint's file.
            owner[id(parameter)].state[parameter] = {
                key: team.place(tensors[full].clone(), parameter) for key, full in state.items()
            }
        unused -= set(state.values())
    assert not unused, sorted(unused)
    torch.set_rng_state(tensors[f"{_RNG}cpu"].clone())
    if f"{_RNG}cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"{_RNG}cuda"].clone())
