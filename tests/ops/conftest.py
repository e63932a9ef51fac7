"""The recurrences of `refold.ops`, each with inputs for tests."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refold.ops import channel_decay, chunking, delta_rule, scalar_decay, selective_scan

Inputs = dict[str, Any]
"""Tensors and None, by the names of a recurrence's arguments."""
F64 = torch.float64


@dataclass(frozen=True)
class Recurrence:
    """One recurrence.

    Attributes:
        ops: Its module.
        make: From a number of tokens to inputs in float64; keywords change sizes.
        tolerance: Of float64, as a share of the largest number.
        few: Sizes small enough to try every difference; none: differences are tried along random directions.
    """

    ops: ModuleType
    make: Callable[..., Inputs]
    tolerance: float = 1e-12
    few: Mapping[str, int] = field(default_factory=dict)

    def inputs(self, tokens: int, dtype: torch.dtype = F64, state: bool = True, **sizes: int) -> Inputs:
        """The same leaves for the same arguments."""
        made = self.make(tokens, **sizes)
        made = {name: None if x is None else x.to(dtype).requires_grad_() for name, x in made.items()}
        return made if state else made | {"state": None}

    def results(self, run: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, **options: Any) -> list[Tensor]:
        """Output, state, and the gradients of a fixed weighting of both."""
        out, state = run(**inputs, **options)
        random = torch.Generator().manual_seed(7)
        loss = sum((x.double() * torch.randn(x.shape, generator=random, dtype=F64)).sum() for x in (out, state))
        return [out, state, *torch.autograd.grad(loss, [x for x in inputs.values() if x is not None])]  # pyright: ignore


def at(inputs: Inputs, tokens: slice | int, state: Tensor | None = None) -> Inputs:
    """Returns some tokens of the inputs, or one token for a step, with another state; inputs without tokens stay."""
    others = {name: x for name, x in inputs.items() if name != "state"}
    return {name: x if x is None or x.dim() < 3 else x[:, tokens] for name, x in others.items()} | {"state": state}


def scalar(decay: str, groups: int, tokens: int) -> Inputs:
    """2 rows, 4 heads, K = 5, V = 3."""
    random = torch.Generator().manual_seed(tokens)
    normal = partial(torch.randn, generator=random, dtype=F64)
    q, k, v = normal(2, tokens, groups, 5), normal(2, tokens, groups, 5), normal(2, tokens, 4, 3)
    shapes = {"token": (2, tokens, 4), "head": (4,)}
    g = -torch.rand(shapes[decay], generator=random, dtype=F64) * 0.5 if decay in shapes else None
    return {"q": q, "k": k, "v": v, "log_decay": g, "state": normal(2, 4, 5, 3)}


def channel(tokens: int) -> Inputs:
    """2 rows, 4 heads, K = 5, V = 3."""
    random = torch.Generator().manual_seed(tokens)
    normal = partial(torch.randn, generator=random, dtype=F64)
    q, k, v = normal(2, tokens, 4, 5), normal(2, tokens, 4, 5), normal(2, tokens, 4, 3)
    g = -torch.rand(2, tokens, 4, 5, generator=random, dtype=F64) * 0.5
    return {"q": q, "k": k, "v": v, "log_decay": g, "state": normal(2, 4, 5, 3)}


def delta(decaying: bool, tokens: int, batch: int = 2, heads: int = 2, key: int = 8) -> Inputs:
    """Keys a little longer than 1: nothing may rely on their length."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(tokens), dtype=F64)
    q, k = (F.normalize(normal(batch, tokens, heads, key), dim=-1) * 1.1 for _ in range(2))
    v, state = normal(batch, tokens, heads, 6), normal(batch, heads, key, 6)
    beta = normal(batch, tokens, heads).sigmoid()
    g = F.logsigmoid(normal(batch, tokens, heads) * 3) if decaying else None
    return {"q": q, "k": k, "v": v, "beta": beta, "log_decay": g, "state": state}


def scan(tokens: int, batch: int = 2, channels: int = 6, size: int = 4) -> Inputs:
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(tokens), dtype=F64)
    x, dt = normal(batch, tokens, channels), F.softplus(normal(batch, tokens, channels) - 1)
    a = -normal(channels, size).exp()
    b, c, state = normal(batch, tokens, size), normal(batch, tokens, size), normal(batch, channels, size)
    return {"x": x, "dt": dt, "a": a, "b": b, "c": c, "state": state}


RECURRENCES: Mapping[str, Recurrence] = {
    **{
        f"scalar-{decay}-{groups}": Recurrence(scalar_decay, partial(scalar, decay, groups))
        for decay in ("token", "head", "none")
        for groups in (4, 2, 1)
    },
    "channel": Recurrence(channel_decay, channel),
    "delta": Recurrence(delta_rule, partial(delta, True), 1e-11, {"heads": 1, "key": 2}),
    "delta-none": Recurrence(delta_rule, partial(delta, False), 1e-11),
    "scan": Recurrence(selective_scan, scan, 1e-11, {"channels": 3, "size": 2}),
}


@pytest.fixture(params=RECURRENCES)
def recurrence(request: pytest.FixtureRequest) -> Recurrence:
    """Each in turn, or those that a test names."""
    return RECURRENCES[request.param]


@pytest.fixture(name="at")
def _at() -> Callable[..., Inputs]:
    return at


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows go through several segments."""
    monkeypatch.setattr(chunking, "CPU_SEGMENT_NUMBERS", 2 * 3 * 4 * 64**2)
