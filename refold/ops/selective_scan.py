"""Mamba's selective scan: each channel has its own small state, whose decay depends on the token.

    h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T,    y_t = h_t c_t        (h_t: [D, N])

arXiv 2312.00752, equations 2 to 4 and algorithm 2, with dt b for its discrete B as in the authors' code. The
caller adds the term D x of the paper to the output.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from refold.ops.chunking import compute_dtype, cut
from refold.ops.recurrence import loop


def step(
    x: Float[Tensor, "B D"],
    dt: Float[Tensor, "B D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "B N"],
    c: Float[Tensor, "B N"],
    state: Float[Tensor, "B D N"] | None,
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D N"]]:
    """Updates the state with one token and reads the output.

    Args:
        x: Input of each channel.
        dt: Step size of each channel, at least 0.
        a: Rates of decay, at most 0.
        b: How the input enters the state.
        c: How the state is read.
        state: float32, or float64 with inputs in float64; None: zeros.

    Returns:
        The output in x's dtype, and the new state.
    """
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        steps = dt.to(dtype)
        new = (steps * x.to(dtype))[:, :, None] * b.to(dtype)[:, None, :]
        if state is not None:
            new = (steps[:, :, None] * a.to(dtype)).exp() * state + new
        out = (new @ c.to(dtype)[:, :, None]).squeeze(-1)
    return out.to(x.dtype), new


def naive(
    x: Float[Tensor, "B T D"],
    dt: Float[Tensor, "B T D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "B T N"],
    c: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """Computes `chunked` token by token, as the reference for tests; same arguments and returns."""
    if state is None:
        state = x.new_zeros(x.shape[0], *a.shape, dtype=compute_dtype(x))

    def take(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        return step(x[:, t], dt[:, t], a, b[:, t], c[:, t], state)

    return loop(take, state, x.shape[1], resets)


def chunked(
    x: Float[Tensor, "B T D"],
    dt: Float[Tensor, "B T D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "B T N"],
    c: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
    chunk_size: int = 16,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """Computes whole rows; all operations except one multiplication per token run over a whole chunk at once.

    Decays differ by channel and by state, so matrix products cannot replace the recurrence as they do for one decay per
    head. Chunks are small, so that their intermediate results stay in the cache.

    Computes in float32 (float64 for inputs in float64). For the backward pass it keeps the inputs and one state per
    chunk, and recomputes the rest. It can be differentiated once.

    Args:
        x: Inputs of each channel.
        dt: Step sizes of each channel, at least 0.
        a: Rates of decay, finite and at most 0.
        b: How inputs enter the state.
        c: How the state is read.
        state: State after the previous tokens; None: zeros.
        resets: True for the first token of a document: the state is set to zero before this token.
        chunk_size: Tokens.

    Returns:
        The outputs in x's dtype, and the state after the last token in float32 (float64).
    """
    dtype = compute_dtype(x)
    start = x.new_zeros(x.shape[0], *a.shape, dtype=dtype) if state is None else state.to(dtype)
    return _SelectiveScan.apply(x, dt, a, b, c, start, resets, chunk_size)  # pyright: ignore[reportReturnType]


class _Rows:
    """Holds the inputs with tokens first, and states with channels last, because operations on long rows are fast."""

    def __init__(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, resets: Tensor | None) -> None:
        dtype = compute_dtype(x)
        self.dt: Float[Tensor, "T B D"] = _tokens_first(dt, dtype)
        self.x: Float[Tensor, "T B D"] = _tokens_first(x, dtype)
        self.entering: Float[Tensor, "T B D"] = self.dt * self.x
        self.b: Float[Tensor, "T B N"] = _tokens_first(b, dtype)
        self.c: Float[Tensor, "T B N"] = _tokens_first(c, dtype)
        self.a: Float[Tensor, "N D"] = a.to(dtype).t().contiguous()
        self.kept = None if resets is None else _tokens_first(~resets, dtype)[:, :, None, None]

    def make_space(self, num_tensors: int, chunk_size: int) -> Float[Tensor, "M S B N D"]:
        """Allocates memory that all chunks reuse, so that it stays in the cache."""
        tokens, batch, channels = self.x.shape
        return self.x.new_empty(num_tensors, min(chunk_size, tokens), batch, len(self.a), channels)

    def run(
        self, chunk: slice, start: Float[Tensor, "B N D"], space: Float[Tensor, "M S B N D"]
    ) -> tuple[Float[Tensor, "C B N D"], Float[Tensor, "C B N D"]]:
        """Returns the decay of the state at each token of a chunk, and the state after each token."""
        decays, states = (part[: chunk.stop - chunk.start] for part in space[:2])
        torch.mul(self.dt[chunk, :, None], self.a, out=decays).exp_()
        if self.kept is not None:
            decays *= self.kept[chunk]
        torch.mul(self.entering[chunk, :, None], self.b[chunk, :, :, None], out=states)
        for decay, state in zip(decays.unbind(), states.unbind(), strict=True):
            state.addcmul_(decay, start)
            start = state
        return decays, states


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        state: Tensor,
        resets: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        chunks = cut(x.shape[1], chunk_size)
        with torch.autocast(x.device.type, enabled=False):
            rows = _Rows(x, dt, a, b, c, resets)
            out = torch.empty_like(rows.x)
            starts = state.new_empty(len(chunks) + 1, *state.mT.shape)
            starts[0] = state.mT
            space = rows.make_space(2, chunk_size)
            for n, chunk in enumerate(chunks):
                _, states = rows.run(chunk, starts[n], space)
                starts[n + 1] = states[-1]
                torch.matmul(rows.c[chunk, :, None], states, out=out[chunk, :, None])
        ctx.save_for_backward(x, dt, a, b, c, resets, starts)
        ctx.chunk_size = chunk_size
        return out.transpose(0, 1).to(x.dtype).contiguous(), starts[-1].mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, resets, starts = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            rows = _Rows(x, dt, a, b, c, resets)
            d_outs = _tokens_first(d_out, rows.x.dtype)
            d_entering, d_dt, d_b, d_c = (torch.empty_like(of) for of in (rows.x, rows.dt, rows.b, rows.c))
            d_a = torch.zeros_like(rows.a)
            d_carried = d_state.mT
            space = rows.make_space(3, ctx.chunk_size)
            for n, chunk in reversed(list(enumerate(cut(x.shape[1], ctx.chunk_size)))):
                decays, states = rows.run(chunk, starts[n], space)
                d_states = space[2, : len(states)]
                torch.mul(d_outs[chunk, :, None], states, out=d_states)
                torch.sum(d_states, 3, out=d_c[chunk])

                torch.mul(d_outs[chunk, :, None], rows.c[chunk, :, :, None], out=d_states)
                d_states[-1] += d_carried
                later = None
                for decay, here in zip(reversed(decays.unbind()), reversed(d_states.unbind()), strict=True):
                    if later is not None:
                        here.addcmul_(*later)
                    later = decay, here
                d_carried = decays[0] * d_states[0]
                torch.matmul(rows.b[chunk, :, None], d_states, out=d_entering[chunk, :, None])

                d_exponents = decays.mul_(d_states)
                d_exponents[0] *= starts[n]
                d_exponents[1:] *= states[:-1]
                d_states *= rows.entering[chunk, :, None]
                torch.sum(d_states, 3, out=d_b[chunk])
                d_a += torch.mul(d_exponents, rows.dt[chunk, :, None], out=d_states).sum((0, 1))
                torch.sum(d_exponents.mul_(rows.a), 2, out=d_dt[chunk])
            d_dt.addcmul_(d_entering, rows.x)
            d_x = d_entering.mul_(rows.dt)
        # Contiguous, because a compiled graph expects gradients with the strides of the inputs.
        d_x, d_dt, d_b, d_c = (
            grad.transpose(0, 1).to(of.dtype).contiguous() for grad, of in ((d_x, x), (d_dt, dt), (d_b, b), (d_c, c))
        )
        return d_x, d_dt, d_a.t().to(a.dtype), d_b, d_c, d_carried.mT, None, None


def _tokens_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).transpose(0, 1).contiguous()
