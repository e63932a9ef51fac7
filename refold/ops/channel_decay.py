"""The recurrence with one decay per key channel, used by gated linear attention.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t

arXiv 2312.06635, equation 3; our exp(g) is its alpha. A score of two tokens of a chunk is
sum_c q_ic k_jc exp(G_ic - G_jc) with G the sums of g. Separate factors exp(G_i) and exp(-G_j) can overflow, so the
paper (section 4.3) cuts chunks into sub-chunks and computes pair by pair inside them. Here a chunk is halved until its
parts are single tokens. For queries of a second half and keys of its first half the decay is split at the border
between the halves. Both factors are at most 1, all operations are matrix products, and each sum covers only the tokens
between key and query.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from refold.ops.chunking import Segment, compute_dtype, look, suffix_sums, to_chunks
from refold.ops.documents import within_documents
from refold.ops.recurrence import InChunks, Inputs, loop, run_in_chunks, start_state


def step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    log_decay: Float[Tensor, "B H K"],
    state: Float[Tensor, "B H K V"] | None,
) -> tuple[Float[Tensor, "B H V"], Float[Tensor, "B H K V"]]:
    """Updates the state with one token and reads the output.

    Args:
        q: Query, scaled.
        k: Key.
        v: Value.
        log_decay: g, at most 0.
        state: float32, or float64 with values in float64; None: zeros.

    Returns:
        The output in v's dtype, and the new state.
    """
    dtype = compute_dtype(v)
    with torch.autocast(v.device.type, enabled=False):
        new = k.to(dtype)[..., None] * v.to(dtype)[..., None, :]
        if state is not None:
            new = new + log_decay.to(dtype).exp()[..., None] * state
        out = q.to(dtype)[..., None, :] @ new
    return out.squeeze(-2).to(v.dtype), new


def naive(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H K"],
    state: Float[Tensor, "B H K V"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Computes `chunked` token by token, as the reference for tests; same arguments and returns."""

    def take(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        return step(q[:, t], k[:, t], v[:, t], log_decay[:, t], state)

    return loop(take, start_state(state, k, v), v.shape[1], resets)


def chunked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H K"],
    state: Float[Tensor, "B H K V"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Computes whole rows: quadratic within chunks, recurrent between chunks (arXiv 2312.06635, section 4.2).

    Computes in float32 (float64 for values in float64). For the backward pass it keeps the inputs and one state per
    segment, and recomputes the rest. It can be differentiated once.

    Args:
        q: Queries, scaled.
        k: Keys.
        v: Values.
        log_decay: g, finite and at most 0.
        state: State after the previous tokens; None: zeros.
        resets: True for the first token of a document: the state is set to zero before this token.
        chunk_size: Tokens, a power of two.

    Returns:
        The outputs in v's dtype, and the state after the last token in float32 (float64).
    """
    assert chunk_size.bit_count() == 1, f"chunk_size: a power of two is required (got {chunk_size})"
    return run_in_chunks(_RECURRENCE, (q, k, v, log_decay), start_state(state, k, v), resets, chunk_size)


def matrix(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    log_decay: Float[Tensor, "B T H K"],
    resets: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H T T"]:
    """Returns the recurrence as an attention matrix M: o = M v from a state of zeros (arXiv 2312.06635, equation 4).

    Args:
        q: Queries, scaled.
        k: Keys.
        log_decay: As of `chunked`.
        resets: As of `chunked`.

    Returns:
        Row t: the weights of all tokens in the output of token t. float32 (float64).
    """
    tokens = q.shape[1]
    mixing: Tensor = _Scores.apply(*(_padded(x.transpose(1, 2).to(compute_dtype(q)), -2) for x in (q, k, log_decay)))  # pyright: ignore[reportAssignmentType]
    return within_documents(mixing[..., :tokens, :tokens], resets)


def _padded(x: Tensor, *dims: int) -> Tensor:
    """Pads dimensions with zeros at the end, up to a power of two."""
    for dim in dims:
        missing = (1 << (x.shape[dim] - 1).bit_length()) - x.shape[dim]
        if missing:
            x = functional.pad(x, (0, 0) * (-1 - dim) + (0, missing))
    return x


class _Decays(NamedTuple):
    """Holds the decay factors of the channels of `[*X, C, K]`.

    Attributes:
        halves: For blocks of 2, 4, ... C tokens: decay from the middle of a block to the tokens after it, and from the
            tokens before the middle to the middle.
        into: Decay from the start of the chunk to a token.
        onto: Decay from a token to the end of the chunk.
    """

    halves: list[tuple[Float[Tensor, "*X M S K"], Float[Tensor, "*X M S K"]]]
    into: Float[Tensor, "*X C K"]
    onto: Float[Tensor, "*X C K"]


def _spread(log_decay: Float[Tensor, "*X C K"]) -> _Decays:
    """Computes decays by sums of log decays, from the start and to the end of blocks whose length doubles each time."""
    since, until = log_decay.clone(), torch.zeros_like(log_decay)
    halves, half = [], 1
    while half < log_decay.shape[-2]:
        (before, after), (early, _) = (x.unflatten(-2, (-1, 2, half)).unbind(-3) for x in (since, until))
        halves.append((after.exp(), early.exp()))
        early += after[..., -1:, :]
        after += before[..., -1:, :]
        half *= 2
    return _Decays(halves, since.exp_(), until.exp_())


def _halves(x: Float[Tensor, "*X C K"], half: int) -> tuple[Tensor, Tensor]:
    first, second = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return first, second


def _blocks(x: Float[Tensor, "*X C C"], half: int) -> Float[Tensor, "*X M S S"]:
    """Returns a view of the quarter of each diagonal block with queries of the second and keys of the first half."""
    quarters = x.unflatten(-1, (-1, 2, half))[..., 0, :].unflatten(-3, (-1, 2, half))[..., 1, :, :, :]
    return quarters.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _scores(
    q: Float[Tensor, "*X C K"], k: Float[Tensor, "*X C K"], halves: list[tuple[Tensor, Tensor]]
) -> Float[Tensor, "*X C C"]:
    size = q.shape[-2]
    scores = q.new_zeros(*q.shape[:-1], size)
    scores.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    for level, (after, before) in enumerate(halves):
        half = 1 << level
        products = (_halves(q, half)[1] * after) @ (_halves(k, half)[0] * before).mT
        _blocks(scores, half).copy_(products)
    return scores


def _differentiate_scores(
    q: Float[Tensor, "*X C K"],
    k: Float[Tensor, "*X C K"],
    halves: list[tuple[Tensor, Tensor]],
    d_scores: Float[Tensor, "*X C C"],
) -> tuple[Float[Tensor, "*X C K"], Float[Tensor, "*X C K"]]:
    """Returns the gradients of queries and keys through scores of different tokens."""
    d_q, d_k = torch.zeros_like(q), torch.zeros_like(k)
    for level, (after, before) in enumerate(halves):
        half = 1 << level
        d_products = _blocks(d_scores, half)
        _halves(d_q, half)[1].addcmul_(_weigh(d_products, _halves(k, half)[0] * before), after)
        _halves(d_k, half)[0].addcmul_(_weigh(d_products.mT, _halves(q, half)[1] * after), before)
    return d_q, d_k


def _weigh(weights: Float[Tensor, "*X S S"], x: Float[Tensor, "*X S K"]) -> Float[Tensor, "*X S K"]:
    """Returns `weights @ x`; for one or two rows it avoids the batched product, whose overhead is larger."""
    if x.shape[-2] > 2:
        return weights @ x
    return sum(weights[..., n, None] * x[..., n : n + 1, :] for n in range(x.shape[-2]))  # pyright: ignore[reportReturnType]


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, log_decay)
        with torch.autocast(q.device.type, enabled=False):
            return _scores(q, k, _spread(log_decay).halves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor, ...]:
        q, k, log_decay = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            d_q, d_k = _differentiate_scores(q, k, _spread(log_decay).halves, d_scores)
        d_decay = suffix_sums(q * d_q - k * d_k, -2)
        own = d_scores.diagonal(dim1=-2, dim2=-1)[..., None]
        return d_q.addcmul_(own, k), d_k.addcmul_(own, q), d_decay


class _Chunks(NamedTuple):
    """Holds a segment's inputs by chunk and token, padded to a power of two, and decays, 0 between documents."""

    q: Float[Tensor, "N B H C K"]
    k: Float[Tensor, "N B H C K"]
    v: Float[Tensor, "N B H C V"]
    halves: list[tuple[Tensor, Tensor]]
    into: Float[Tensor, "N B H C K"]  # from the state before the chunk to a token
    onto: Float[Tensor, "N B H C K"]  # from a token to the state after the chunk
    across: Float[Tensor, "N B H K 1"]  # from the state before the chunk to the state after it
    seen: Bool[Tensor, "N B 1 C C"] | None  # true for two tokens of one document

    def mix(self) -> Float[Tensor, "N B H C C"]:
        """Returns the weight of each token in the outputs of the tokens of its chunk."""
        return self.masked(_scores(self.q, self.k, self.halves))

    def masked(self, scores: Float[Tensor, "N B H C C"]) -> Float[Tensor, "N B H C C"]:
        """Sets the scores between documents to 0, in place."""
        return scores if self.seen is None else scores.mul_(self.seen)

    def states(self, start: Float[Tensor, "B H K V"]) -> Float[Tensor, "S B H K V"]:
        """Returns the state before each chunk, and the state after the last chunk."""
        written = (self.k * self.onto).mT @ self.v
        states = written.new_empty(len(written) + 1, *start.shape)
        states[0] = start
        for n, new in enumerate(written):
            torch.addcmul(new, self.across[n], states[n], out=states[n + 1])
        return states


def _read(inputs: Inputs, numbers: Tensor | None, segment: Segment) -> _Chunks:
    dtype = compute_dtype(inputs[2])
    queries, keys, values, decays = (_padded(to_chunks(x, segment, dtype), -2) for x in inputs)
    halves, into, onto = _spread(decays)
    across, seen = into[..., -1, :, None], None
    if numbers is not None:
        sight = look(numbers, segment)
        across = across * sight.across[..., None, None]
        into = into.mul_(_padded(sight.before, -1)[..., None])
        onto = onto.mul_(_padded(sight.after, -1)[..., None])
        seen = _padded(sight.pairs, -1, -2)
    return _Chunks(queries, keys, values, halves, into, onto, across, seen)


def _run(chunks: _Chunks, start: Float[Tensor, "B H K V"]) -> tuple[Tensor, Tensor]:
    states = chunks.states(start)
    return (chunks.mix() @ chunks.v).add_((chunks.q * chunks.into) @ states[:-1]), states[-1].clone()


def _differentiate(
    chunks: _Chunks,
    start: Float[Tensor, "B H K V"],
    d_found: Float[Tensor, "N B H C V"],
    d_leaving: Float[Tensor, "B H K V"],
    wanted: tuple[bool, ...],
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Returns the gradients of one segment: of q, k, v, the log decays, and the state at its start."""
    q, k, v, d_found = chunks.q, chunks.k, chunks.v, _padded(d_found, -2)
    states = chunks.states(start)[:-1]
    found = (q * chunks.into).mT @ d_found
    d_states = found.new_empty(len(found) + 1, *start.shape)
    d_states[-1] = d_leaving
    for n in reversed(range(len(found))):
        torch.addcmul(found[n], chunks.across[n], d_states[n + 1], out=d_states[n])
    d_written = d_states[1:]

    d_v = (chunks.mix().mT @ d_found).add_((k * chunks.onto) @ d_written)
    d_scores = chunks.masked(d_found @ v.mT)
    d_q, d_k = _differentiate_scores(q, k, chunks.halves, d_scores)
    d_q.addcmul_(d_found @ states.mT, chunks.into)
    d_k_carried = (v @ d_written.mT).mul_(chunks.onto)
    d_k += d_k_carried
    # Gradient of sums of log decays: the score of a token with itself does not decay and is added afterwards.
    d_sums = (q * d_q).addcmul_(k, d_k, value=-1)
    d_sums[..., -1, :] += (k * d_k_carried).sum(-2) + (states * d_written).sum(-1) * chunks.across[..., 0]
    own = d_scores.diagonal(dim1=-2, dim2=-1)[..., None]
    return (d_q.addcmul_(own, k), d_k.addcmul_(own, q), d_v, suffix_sums(d_sums, -2)), d_states[0]


_RECURRENCE = InChunks(_read, _run, _differentiate)
