"""What all recurrences over a state `[B, H, K, V]` have in common: the loop over tokens, and the one over segments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from refold.ops.chunking import Segment, compute_dtype, put_chunks, segments, to_chunks
from refold.ops.documents import number_documents

Inputs = tuple[Tensor, ...]
"""Queries, keys and values `[B, T, ...]`, and what else a recurrence takes."""
State = Float[Tensor, "B H K V"]


class InChunks(NamedTuple):
    """How a recurrence works on one segment. Its methods see compute dtypes, and no autocast.

    Attributes:
        read: From inputs, the tokens' documents and a segment to what the others are given first.
        run: From that and the state before the segment to outputs `[N, B, H, C, V]` and the state after it.
        differentiate: From that, the state before the segment, gradients of outputs and of the state after it, and
            which inputs want a gradient, to the inputs' gradients by chunk, head and token, or None where none is
            wanted, and that of the state before.
    """

    read: Callable[[Inputs, Int[Tensor, "B T"] | None, Segment], Any]
    run: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    differentiate: Callable[[Any, Tensor, Tensor, Tensor, tuple[bool, ...]], tuple[tuple[Tensor | None, ...], Tensor]]


def loop(
    step: Callable[[int, Any], tuple[Tensor, Tensor]], state: Tensor, tokens: int, resets: Bool[Tensor, "B T"] | None
) -> tuple[Tensor, Tensor]:
    """Goes from token to token.

    Args:
        step: From a token's place and the state before it to its output and the state after it.
        state: Before the first token.
        tokens: In a row.
        resets: Where the state is emptied before the token is taken in.

    Returns:
        The outputs `[B, T, ...]`, and the state after the last token.
    """
    outs = []
    for t in range(tokens):
        if resets is not None:
            state = state.masked_fill(resets[:, t].view(-1, *[1] * (state.dim() - 1)), 0.0)
        out, state = step(t, state)
        outs.append(out)
    return torch.stack(outs, dim=1), state


def scan(
    step: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    state: Tensor,
    resets: Bool[Tensor, "B T"] | None,
) -> tuple[Tensor, Tensor]:
    """Goes from token to token by torch's scan operator: an exported graph with it serves rows of any length.

    The chunked forms cut rows by Python numbers, which a graph would hold fixed.

    Args:
        step: From a token's inputs and the state before it to its output and the state after it.
        inputs: Each `[B, T, ...]`.
        state: Before the first token.
        resets: Where the state is emptied before the token is taken in.

    Returns:
        The outputs `[B, T, ...]`, and the state after the last token.
    """
    # A prototype of torch's, which nothing but an export needs.
    from torch._higher_order_ops.scan import scan as scan_operator

    def take(state: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        *token, reset = given if resets is not None else (*given, None)
        if reset is not None:
            state = state.masked_fill(reset.view(-1, *[1] * (state.dim() - 1)), 0.0)
        out, state = step(*token, state)
        return state, out

    by_token = (*inputs, resets) if resets is not None else inputs
    state, outs = scan_operator(take, state, tuple(x.transpose(0, 1) for x in by_token), dim=0)
    return outs.transpose(0, 1), state


def start_state(state: State | None, k: Float[Tensor, "B T G K"], v: Float[Tensor, "B T H V"]) -> State:
    """The given state in the dtype recurrences compute in; zeros where there is none."""
    if state is None:
        return v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=compute_dtype(v))
    return state.to(compute_dtype(v))


def run_in_chunks(
    recurrence: InChunks, inputs: Inputs, state: State, resets: Bool[Tensor, "B T"] | None, chunk_size: int
) -> tuple[Float[Tensor, "B T H V"], State]:
    """Runs whole rows, segment by segment.

    For backward it keeps the inputs and one state per segment. It can be differentiated once.

    Args:
        recurrence: How a segment is worked on.
        inputs: Values are the third of them. One without tokens, such as a decay per head, is the same for all.
        state: Before the first token, from `start_state`.
        resets: Where a document begins: the state is emptied before that token is taken in.
        chunk_size: Tokens.

    Returns:
        The outputs in the values' dtype, and the state after the last token.
    """
    numbers = None if resets is None else number_documents(resets, resets.shape[0], resets.shape[1], resets.device)
    return _InChunks.apply(recurrence, chunk_size, numbers, state, *inputs)  # pyright: ignore[reportReturnType]


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recurrence: InChunks, chunk_size: int, numbers: Tensor | None, state: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        v, starts = inputs[2], []
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        with torch.autocast(v.device.type, enabled=False):
            for segment in segments(v, chunk_size):
                starts.append(state)
                # Named, so that its memory is not given back to be asked for anew by the next.
                chunks = recurrence.read(inputs, numbers, segment)
                found, state = recurrence.run(chunks, state)
                put_chunks(out, segment, found)
        ctx.save_for_backward(numbers, *inputs, *starts)
        ctx.recurrence, ctx.chunk_size, ctx.num_inputs = recurrence, chunk_size, len(inputs)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        numbers, *saved = ctx.saved_tensors
        inputs, starts = tuple(saved[: ctx.num_inputs]), saved[ctx.num_inputs :]
        wanted = ctx.needs_input_grad[4:]
        grads = [(torch.empty if x.dim() > 2 else torch.zeros)(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
        with torch.autocast(d_out.device.type, enabled=False):
            for segment in reversed(list(segments(d_out, ctx.chunk_size))):
                chunks = ctx.recurrence.read(inputs, numbers, segment)
                d_found = to_chunks(d_out, segment, d_state.dtype)
                parts, d_state = ctx.recurrence.differentiate(chunks, starts.pop(), d_found, d_state, wanted)
                for grad, part in zip(grads, parts, strict=True):
                    if part is not None and grad.dim() > 2:
                        put_chunks(grad, segment, part)
                    elif part is not None:
                        grad += part.sum(dim=(0, 1, 3))
        returned = (grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True))
        return None, None, None, d_state, *returned
