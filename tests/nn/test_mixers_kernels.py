"""Mixers call kernels for their recurrences if kernels exist."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from refold.nn.mixers.registry import MIXERS
from refold.ops import choice, kernels

ENTRIES: dict[str, dict[str, Any]] = {
    "retention": {},
    "mamba2": {"q_heads": 2, "k_heads": 2, "key_dim": 6},
    "gla": {},
    "gated_deltanet": {},
    "linear_attention": {"window": 5},
}


def test_all_mixers_but_those_without_kernels_are_tried() -> None:
    assert set(MIXERS) - set(ENTRIES) == {"attention", "mamba"}


@pytest.mark.parametrize("kind", ENTRIES)
def test_mixers_give_the_same_with_kernels(make_mixer: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    lone = make_mixer(kind, **ENTRIES[kind])
    x = torch.randn(2, 9, lone.arch.hidden_size, generator=torch.Generator().manual_seed(1))
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[0, 4] = resets[1, 0] = True
    wanted = lone.run(x, resets), lone.run_with_cache(x, 6)

    calls: list[bool] = []

    def stand_in(recurrence: ModuleType) -> Callable[..., tuple[Tensor, Tensor]]:
        def kernel(*inputs: Any, in_chunks: bool) -> tuple[Tensor, Tensor]:
            calls.append(in_chunks)
            return recurrence.naive(*inputs)

        return kernel

    monkeypatch.setattr(kernels, "serve", lambda q, v: True)
    monkeypatch.setattr(choice, "KERNELS", {recurrence: stand_in(recurrence) for recurrence in choice.KERNELS})
    found = lone.run(x, resets), lone.run_with_cache(x, 6)
    assert calls == [True, True, False, False, False]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
