"""The Muon optimizer, with many matrices orthogonalised at once in the dtype that is fast on the device."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from refold.healing.precision import has_fast_bfloat16

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Coefficients of the quintic polynomial (Jordan et al., https://kellerjordan.github.io/posts/muon). The polynomial is
steep at zero, and the iteration ends with singular values between 0.7 and 1.2, which is near enough to 1."""
NUM_STEPS = 5
MOMENTUM = 0.95
LARGEST_STACK = 2**24
"""Largest number of elements that are orthogonalised at once; a larger matrix is orthogonalised alone."""
_EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Updates matrices by their orthogonalised momentum, scaled to AdamW's updates (arXiv 2502.16982).

    The steps and the state are those of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, with two differences that
    make it fast for small matrices. Matrices of one shape are orthogonalised in one batched product. The products are
    in float32 if the device has no fast bfloat16, because emulated bfloat16 products can take half as long as the rest
    of a training step.
    """

    def __init__(
        self, parameters: Iterable[Any], lr: float, weight_decay: float = 0.0, momentum: float = MOMENTUM
    ) -> None:
        """Takes matrices, or groups of matrices like any optimizer."""
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates all parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in _stacks([p for p in group["params"] if p.grad is not None]):
                updates = orthogonalise(torch.stack([self._direction(p, group) for p in parameters]))
                scale = 0.2 * math.sqrt(max(updates.shape[-2:]))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)
        return loss

    def _direction(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(state["momentum_buffer"], group["momentum"])


def orthogonalise(matrices: Tensor) -> Tensor:
    """Returns an approximation of `U V^T` for each matrix `U S V^T`, by Newton-Schulz iteration.

    Args:
        matrices: `[N, rows, columns]`.

    Returns:
        `[N, rows, columns]`, in bfloat16 if the device has it in hardware, else in float32. Singular values lie between
        about 0.7 and 1.2, except those that were tiny in comparison with the largest.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(torch.bfloat16 if has_fast_bfloat16(matrices.device) else torch.float32)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _stacks(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Groups parameters by shape, device and dtype, and splits groups above `LARGEST_STACK`."""
    alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.shape, parameter.device, parameter.dtype), []).append(parameter)
    for members in alike.values():
        count = max(1, LARGEST_STACK // members[0].numel())
        yield from (members[at : at + count] for at in range(0, len(members), count))
