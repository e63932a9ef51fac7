"""Causal depthwise convolution over the last few tokens, used by Mamba and similar mixers before the recurrence.

y_t = bias + sum_j weight[:, j] * x_{t - (W - 1) + j}, with zeros for inputs of another document or before the first
(arXiv 2312.00752, section 3.4; the layout of weights is that of a depthwise `torch.nn.Conv1d` without its middle axis).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from refold.ops.documents import number_documents

_BLOCK_TOKENS = 128
"""Tokens processed at once on a CPU, so that inputs stay in the cache for all taps; measured to be twice as fast."""


def convolve(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None = None,
    past: Float[Tensor, "B C before"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T C"]:
    """Convolves each channel with its own W taps over the token and the W - 1 before it, in the same document.

    Computed in float32 (float64 for float64 inputs) and returned in the dtype of `x`.

    Args:
        x: Inputs.
        weight: Taps, that of the oldest token first.
        bias: Bias of each channel; None: no bias.
        past: The W - 1 inputs before `x`, oldest first, with zeros for missing inputs; None: all zeros.
        resets: True for the first token of a document, which does not see earlier inputs.
    """
    with torch.autocast(x.device.type, enabled=False):
        prepared = _prepare(x, weight, bias, past, resets)
        compute = _sum_taps if torch.compiler.is_exporting() else _Convolution.apply
        return compute(*prepared).to(x.dtype)


def naive(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None = None,
    past: Float[Tensor, "B C before"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T C"]:
    """Computes `convolve` token by token with the last W inputs as state, as the slow reference for tests."""
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    window = x.new_zeros(batch, channels, width)
    if past is not None:
        window = torch.cat([window[:, :, :1], past.to(x.dtype)], dim=2)
    outputs = []
    for token in range(tokens):
        if resets is not None:
            window = window.masked_fill(resets[:, token, None, None], 0.0)
        window = torch.cat([window[:, :, 1:], x[:, token, :, None]], dim=2)
        out = (window * weight).sum(dim=2)
        outputs.append(out if bias is None else out + bias)
    return torch.stack(outputs, dim=1).to(x.dtype)


def _prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns inputs after the past, transposed taps, bias, and a mask of the W - 1 previous inputs of each token."""
    batch, tokens, _ = x.shape
    before = weight.shape[1] - 1
    assert past is None or past.shape[2] == before, "the past holds one input less than there are taps"
    dtype = torch.promote_types(x.dtype, torch.float32)
    if past is None:
        inputs = F.pad(x.to(dtype), (0, 0, before, 0))
    else:
        inputs = torch.cat([past.transpose(1, 2).to(dtype), x.to(dtype)], dim=1)
    seen = None
    if resets is not None:
        numbers = number_documents(resets, batch, tokens, x.device)
        padded = F.pad(numbers, (before, 0))
        # Slices, as `unfold` of all tokens would fix their number in an exported graph.
        others = torch.stack([padded[:, tap : tap + tokens] for tap in range(before + 1)], dim=1)
        seen = (others == numbers[:, None]).to(dtype).unsqueeze(-1)
    return inputs, weight.t().contiguous().to(dtype), None if bias is None else bias.to(dtype), seen


def _sum_taps(inputs: Tensor, taps: Tensor, bias: Tensor | None, seen: Tensor | None) -> Tensor:
    """Returns the sum of shifted products without blocks of tokens, for exported graphs with rows of any length."""
    before = taps.shape[0] - 1
    tokens = inputs.shape[1] - before
    out = inputs[:, before:] * taps[before]
    for tap in range(before):
        earlier = inputs[:, tap : tap + tokens]
        out = out + (earlier if seen is None else earlier * seen[:, tap]) * taps[tap]
    return out if bias is None else out + bias


class _Convolution(torch.autograd.Function):
    """Computes a sum of shifted products. Its backward is several times as fast as that of autograd or of conv1d."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, taps: Tensor, bias: Tensor | None, seen: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, taps, seen)
        ctx.has_bias = bias is not None
        before = taps.shape[0] - 1
        out = torch.empty_like(inputs[:, before:])
        for start, stop in _blocks(out):
            here = torch.mul(inputs[:, start + before : stop + before], taps[before], out=out[:, start:stop])
            if bias is not None:
                here += bias
            for tap in range(before):
                earlier = inputs[:, start + tap : stop + tap]
                here.addcmul_(earlier if seen is None else earlier * seen[:, tap, start:stop], taps[tap])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        inputs, taps, seen = ctx.saved_tensors
        grad_inputs, grad_taps = torch.zeros_like(inputs), torch.zeros_like(taps)
        for start, stop in _blocks(grad):
            for tap in range(len(taps)):
                here = grad[:, start:stop]
                if seen is not None and tap < len(taps) - 1:
                    here = here * seen[:, tap, start:stop]
                grad_inputs[:, start + tap : stop + tap].addcmul_(here, taps[tap])
                grad_taps[tap] += (here * inputs[:, start + tap : stop + tap]).sum(dim=(0, 1))
        return grad_inputs, grad_taps, grad.sum(dim=(0, 1)) if ctx.has_bias else None, None


def _blocks(out: Tensor) -> list[tuple[int, int]]:
    """Returns start and end of each block of tokens; on other devices than a CPU all tokens are one block."""
    tokens = out.shape[1]
    size = _BLOCK_TOKENS if out.device.type == "cpu" else tokens
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]
