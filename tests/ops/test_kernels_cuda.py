"""flash-linear-attention's kernels beside our own chunks, on a CUDA device."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refold.ops import channel_decay, choice, delta_rule, kernels, scalar_decay

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed"),
]

HEADS, KEY, VALUE = 4, 64, 32
TOLERANCES = {torch.float32: 0.005, torch.bfloat16: 0.02}
"""Root mean square of differences over that of what is wanted. In float32 kernels round factors to TF32."""
PLACES = (0, 1, 2, 10, 11, 63, 64, 65, 99, 128, 700)
DELTAS = ("delta", "delta, no decay")
KINDS = ("decay per token", "groups", "decay per head", "no decay", "decay per channel", *DELTAS)


def make(kind: str, tokens: int, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor | None]]:
    """A recurrence and its inputs as mixers make them: queries, keys and values in one dtype, rates in float32."""
    random = torch.Generator("cuda").manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device="cuda")

    groups = 2 if kind == "groups" else HEADS
    q, k = (F.normalize(normal(2, tokens, groups, KEY), dim=-1) for _ in range(2))
    inputs: dict[str, Tensor | None] = {"q": q, "k": k, "v": normal(2, tokens, HEADS, VALUE)}
    inputs = {name: None if x is None else x.to(dtype) for name, x in inputs.items()}
    state = normal(2, HEADS, KEY, VALUE)
    decay = F.logsigmoid(normal(2, tokens, HEADS) + 2)
    if kind in DELTAS:
        inputs |= {"beta": normal(2, tokens, HEADS).sigmoid(), "log_decay": decay if kind == "delta" else None}
        recurrence = delta_rule
    elif kind == "decay per channel":
        inputs["log_decay"] = F.logsigmoid(normal(2, tokens, HEADS, KEY) + 2)
        recurrence = channel_decay
    else:
        per_head = -torch.rand(HEADS, generator=random, device="cuda") * 0.1
        inputs["log_decay"] = {"decay per head": per_head, "no decay": None}.get(kind, decay)
        recurrence = scalar_decay
    fixed = {"log_decay"} if kind == "decay per head" else set()
    inputs["state"] = state
    return recurrence, {
        name: x if x is None or name in fixed else x.detach().requires_grad_() for name, x in inputs.items()
    }


def results(found: tuple[Tensor, Tensor], inputs: dict[str, Tensor | None]) -> list[Tensor]:
    """Output, state, and the gradients of a fixed weighting of both."""
    random = torch.Generator("cuda").manual_seed(7)
    loss = sum((x.double() * torch.randn(x.shape, generator=random, device="cuda")).sum() for x in found)
    leaves = [x for x in inputs.values() if x is not None and x.requires_grad]
    try:
        return [*found, *torch.autograd.grad(loss, leaves)]  # pyright: ignore[reportArgumentType, reportCallIssue]
    except RuntimeError as error:
        if "Triton" in str(error) and "incorrect results" in str(error):
            pytest.skip(f"the library refuses its own backward here: {error}")
        raise


def assert_near(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.dtype == other.dtype
        error, size = ((x.double().square().mean().sqrt()) for x in (one.double() - other.double(), other))
        # What is zero, such as gradients of decays where each token is a document, is so in both.
        assert float(error) <= tolerance * max(float(size), 1e-3), f"result {number}: {error} beside {size}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
def test_kernels_give_what_chunks_give(kind: str, dtype: torch.dtype, packed: bool, tokens: int) -> None:
    recurrence, inputs = make(kind, tokens, dtype)
    resets = None
    if packed:
        resets = torch.zeros(2, tokens, dtype=torch.bool, device="cuda")
        resets[0, [place for place in PLACES if place < tokens]] = True
        resets[1, tokens // 2] = True
    assert kernels.serve(inputs["q"], inputs["v"])  # pyright: ignore[reportArgumentType]
    wanted = results(recurrence.chunked(**inputs, resets=resets), inputs)
    found = results(choice.KERNELS[recurrence](**inputs, resets=resets), inputs)
    assert_near(found, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@torch.no_grad()
def test_a_single_token_is_taken_in_alike(kind: str, dtype: torch.dtype) -> None:
    recurrence, inputs = make(kind, 1, dtype)
    wanted = recurrence.naive(**inputs)
    found = choice.KERNELS[recurrence](**inputs, in_chunks=False)
    assert_near(list(found), list(wanted), TOLERANCES[dtype])
