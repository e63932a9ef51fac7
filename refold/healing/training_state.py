"""All tensors a training run is made of, by name, out of the live objects and back into them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_MODEL, _OPTIMIZER, _RNG = "model.", "optimizer.", "rng."


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns parameters, optimizer state and the states of torch's random number generators."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"{_MODEL}{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_OPTIMIZER}{name}.{key}"] = value
    tensors[f"{_RNG}cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"{_RNG}cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts collected tensors back; the model and optimizer are made as they were when they were collected."""
    unused = set(tensors)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"{_MODEL}{name}"])
        prefix = f"{_OPTIMIZER}{name}."
        state = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
        if state:
            # Copied: the reader's tensors are views of the checkpoint's file.
            optimizer.state[parameter] = {
                key: tensors[full].to(parameter.device, copy=True) for key, full in state.items()
            }
        unused -= {f"{_MODEL}{name}", *state.values()}
    torch.set_rng_state(tensors[f"{_RNG}cpu"].clone())
    if f"{_RNG}cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"{_RNG}cuda"].clone())
    unused -= {f"{_RNG}cpu", f"{_RNG}cuda"}
    assert not unused, sorted(unused)
