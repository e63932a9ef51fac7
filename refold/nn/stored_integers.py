"""Quantised weights as parameters of any module: the tensors that hold their integers."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from refold.blueprint.integers import Scheme
from refold.nn.rounding import Rounded, read_stored, round_weight


class StoredIntegers:
    """The quantised weights of a module, which holds each as parameters `NAME_packed`, `NAME_scale`, ...

    Args:
        module: Gets the parameters.
        weights: Scheme and shape `(out, in)` by the name that the weight has in the module.
        device: Of the parameters; None: torch's default.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, tuple[Scheme, tuple[int, int]]],
        device: torch.device | None = None,
    ):
        self._held: Any = module._parameters
        self._weights = dict(weights)
        for name, (scheme, shape) in self._weights.items():
            for piece in scheme.pieces(*shape):
                value = torch.zeros(piece.shape, dtype=getattr(torch, piece.dtype), device=device)
                module.register_parameter(f"{name}{piece.suffix}", nn.Parameter(value, requires_grad=False))

    def move_to(self, parameters: Any) -> None:
        """Reads from another dict of parameters from now on."""
        self._held = parameters

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def scheme(self, name: str) -> Scheme:
        """Returns the scheme of a weight."""
        return self._weights[name][0]

    def read(self, name: str) -> Rounded:
        """Returns the integers of a weight."""
        scheme, shape = self._weights[name]
        pieces = {piece.suffix: self._held[f"{name}{piece.suffix}"].detach() for piece in scheme.pieces(*shape)}
        return read_stored(pieces, scheme, shape)

    def write(self, name: str, weight: Rounded) -> None:
        """Sets a weight."""
        for suffix, value in weight.store(self._weights[name][0]).items():
            parameter = self._held[f"{name}{suffix}"]
            parameter.data = value.to(parameter.device)

    def dequantise(self) -> dict[str, Tensor]:
        """Returns all weights by name, in float32 or the dtype of the module."""
        return {name: self.read(name).dequantise() for name in self._weights}

    def reset(self) -> None:
        """Sets all weights to zero, except those that a loader has set."""
        for name, (scheme, shape) in self._weights.items():
            packed = self._held[f"{name}_packed"]
            if not packed.is_meta and not getattr(packed, "_is_hf_initialized", False):
                self.write(name, round_weight(torch.zeros(shape), scheme))


SCALE = "_scale"


def keep_scales(module: nn.Module, change: Callable[[], object]) -> None:
    """Runs a change of dtype and device of a module's own parameters, after which scales are bfloat16 as before."""
    held: Any = module._parameters
    before = {name: each.data for name, each in held.items() if name.endswith(SCALE) and each is not None}
    change()
    for name, scale in before.items():
        if not scale.is_meta and held[name].dtype != torch.bfloat16:
            held[name].data = scale.to(held[name].device, torch.bfloat16)


def settle_scales(model: nn.Module) -> None:
    """Gives all scales of a loaded model their dtype, and takes their gradients away: loaders set both."""
    for name, parameter in model.named_parameters():
        if name.endswith(SCALE):
            parameter.data = parameter.data.to(torch.bfloat16)
            parameter.requires_grad_(False)
