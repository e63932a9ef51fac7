"""The causal convolution equals its token loop and torch's, and no token sees another document."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refold.ops.convolution import convolve, naive


def make(tokens: int, width: int = 4, dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens + width)
    shapes = (batch, tokens, 6), (6, width), (6,), (batch, 6, width - 1)
    return tuple(torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


def resets_at(tokens: int, *places: int) -> Tensor:
    resets = torch.zeros(2, tokens, dtype=torch.bool)
    for place in places:
        resets[0, place % tokens] = True
        resets[1, (place + 2) % tokens] = True
    return resets


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 63, 127, 128, 129, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_convolution_equals_the_token_loop_in_outputs_and_gradients(tokens: int, width: int, packed: bool) -> None:
    x, weight, bias, past = make(tokens, width)
    resets = resets_at(tokens, 0, 3, 4, 5, 64, 127, 128) if packed else None
    found, wanted = (f(x, weight, bias, past, resets) for f in (convolve, naive))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(wanted)
    leaves = [x, weight, bias] + [past] * (width > 1)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, grad, allow_unused=True),
        torch.autograd.grad(wanted, leaves, grad, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_without_documents_it_is_a_padded_depthwise_conv1d() -> None:
    x, weight, bias, _ = make(200)
    wanted = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[:, None], bias, groups=6).transpose(1, 2)
    torch.testing.assert_close(convolve(x, weight, bias), wanted)
    torch.testing.assert_close(convolve(x, weight), wanted - bias)


def test_packed_documents_equal_documents_alone_even_beside_huge_inputs() -> None:
    x, weight, bias, past = (t.detach() for t in make(200))
    x[:, :70] *= 1e30
    past *= 1e30
    resets = torch.zeros(2, 200, dtype=torch.bool)
    for place in (0, 70, 71, 73, 128):
        resets[:, place] = True
    packed = convolve(x, weight, bias, past, resets)
    bounds = (0, 70, 71, 73, 128, 200)
    alone = [convolve(x[:, a:b], weight, bias) for a, b in pairwise(bounds)]
    assert torch.equal(packed, torch.cat(alone, dim=1))
    assert not torch.equal(packed[:, 73:], convolve(x, weight, bias, past)[:, 73:])


@pytest.mark.parametrize("cut", [1, 2, 64, 199])
def test_two_calls_with_the_last_inputs_handed_on_equal_one(cut: int) -> None:
    x, weight, bias, past = (t.detach() for t in make(200))
    first = convolve(x[:, :cut], weight, bias, past)
    handed = torch.cat([past, x[:, :cut].transpose(1, 2)], dim=2)[:, :, -3:]
    second = convolve(x[:, cut:], weight, bias, handed)
    torch.testing.assert_close(torch.cat([first, second], dim=1), convolve(x, weight, bias, past))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_finite_differences(packed: bool) -> None:
    x, weight, bias, past = make(9, width=3)
    resets = resets_at(9, 0, 4, 5) if packed else None
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, past: convolve(x, weight, bias, past, resets), (x, weight, bias, past)
    )


def test_bfloat16_inputs_are_worked_on_in_float32_under_autocast_too() -> None:
    x, weight, bias, past = (t.detach().bfloat16() for t in make(300))
    wanted = convolve(x.float(), weight.float(), bias.float(), past.float()).bfloat16()
    assert torch.equal(convolve(x, weight, bias, past), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        found = convolve(x.float(), weight.float(), bias.float(), past.float())
    assert found.dtype == torch.float32
    assert torch.equal(found.bfloat16(), wanted)


def test_a_past_of_another_width_is_refused() -> None:
    x, weight, bias, _ = make(5)
    with pytest.raises(AssertionError, match="one input less"):
        convolve(x, weight, bias, torch.zeros(2, 6, 4, dtype=torch.float64))
