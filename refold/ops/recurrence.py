"""Loops over tokens and over segments, common to all recurrences over a state `[B, H, K, V]`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from refold.ops.chunking import Segment, compute_dtype, put_chunks, segments, to_chunks
from refold.ops.documents import number_documents

Inputs = tuple[Tensor, ...]
"""Queries, keys and values `[B, T, ...]`, and further inputs of a recurrence, such as decays."""
State = Float[Tensor, "B H K V"]


class InChunks(NamedTuple):
    """Functions of a recurrence for one segment. They get the compute dtype and run without autocast.

    Attributes:
        read: Maps inputs, document numbers of the tokens and a segment to the chunks of the segment.
        run: Maps these chunks and the state before the segment to outputs `[N, B, H, C, V]` and the state after it.
        differentiate: Maps these chunks, the state before the segment, the gradients of outputs and of the state after
            it, and a flag for each input that needs a gradient to the gradients of the inputs by chunk, head and token
            (None if not needed), and the gradient of the state before the segment.
    """

    read: Callable[[Inputs, Int[Tensor, "B T"] | None, Segment], Any]
    run: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    differentiate: Callable[[Any, Tensor, Tensor, Tensor, tuple[bool, ...]], tuple[tuple[Tensor | None, ...], Tensor]]


def loop(
    step: Callable[[int, Any], tuple[Tensor, Tensor]], state: Tensor, tokens: int, resets: Bool[Tensor, "B T"] | None
) -> tuple[Tensor, Tensor]:
    """Runs a recurrence token by token.

    Args:
        step: Maps the index of a token and the state before it to its output and the state after it.
        state: State before the first token.
        tokens: Tokens in a row.
        resets: True for tokens before which the state is set to zero.

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
    """Runs a recurrence token by token with torch's scan operator, for exported graphs with rows of any length.

    The chunked forms cut rows by Python numbers, which are constants in a graph.

    Args:
        step: Maps the inputs of a token and the state before it to its output and the state after it.
        inputs: Inputs, each `[B, T, ...]`.
        state: State before the first token.
        resets: True for tokens before which the state is set to zero.

    Returns:
        The outputs `[B, T, ...]`, and the state after the last token.
    """
    # The operator is a prototype of torch, and only exports need it.
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
    """Returns the given state, or zeros for None, in the dtype of the computation."""
    if state is None:
        return v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=compute_dtype(v))
    return state.to(compute_dtype(v))


def run_in_chunks(
    recurrence: InChunks, inputs: Inputs, state: State, resets: Bool[Tensor, "B T"] | None, chunk_size: int
) -> tuple[Float[Tensor, "B T H V"], State]:
    """Runs whole rows, segment by segment.

    For the backward pass it keeps the inputs and one state per segment. It can be differentiated once.

    Args:
        recurrence: Functions for one segment.
        inputs: Inputs, with the values as the third. An input without a token dimension, such as a decay per head, is
            the same for all tokens.
        state: State before the first token, from `start_state`.
        resets: True for the first token of a document: the state is set to zero before this token.
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
                # The name keeps the memory until the next segment, so that it is not freed and allocated again.
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
