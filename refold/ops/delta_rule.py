"""The delta rule, without and with a decay: a token replaces the value that the state holds for its key.

    S <- exp(g_t) S,    u_t = beta_t (v_t - S^T k_t),    S <- S + k_t u_t^T,    o_t = S^T q_t

DeltaNet is arXiv 2406.06484 (equation 4; chunks in sections 3.2 and 3.3), the gated rule arXiv 2412.06464 (equation 10;
our exp(g) is its alpha). Their states are the transpose of ours.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from refold.ops.chunking import (
    Segment,
    compute_dtype,
    look,
    pairwise_decay,
    suffix_sums,
    to_chunks,
)
from refold.ops.documents import within_documents
from refold.ops.recurrence import InChunks, Inputs, loop, run_in_chunks, start_state


def step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    beta: Float[Tensor, "B H"],
    log_decay: Float[Tensor, "B H"] | None,
    state: Float[Tensor, "B H K V"] | None,
) -> tuple[Float[Tensor, "B H V"], Float[Tensor, "B H K V"]]:
    """Updates the state with one token and reads the output.

    Args:
        q: Query, scaled.
        k: Key, usually of length 1.
        v: Value.
        beta: Share of the value held for the key that is replaced, from 0 to 1 (up to 2 with keys of length 1).
        log_decay: g, at most 0; None: no decay.
        state: float32, or float64 with values in float64; None: zeros.

    Returns:
        The output in v's dtype, and the new state.
    """
    dtype = compute_dtype(v)
    with torch.autocast(v.device.type, enabled=False):
        query, key, value = q.to(dtype), k.to(dtype), v.to(dtype)
        if state is None:
            state = value.new_zeros(*key.shape, value.shape[-1])
        if log_decay is not None:
            state = state * log_decay.to(dtype).exp()[..., None, None]
        held = (key[..., None, :] @ state).squeeze(-2)
        written = beta.to(dtype)[..., None] * (value - held)
        state = state + key[..., None] * written[..., None, :]
        out = (query[..., None, :] @ state).squeeze(-2)
    return out.to(v.dtype), state


def naive(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Computes `chunked` token by token, as the reference for tests; same arguments and returns."""

    def take(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        decay = None if log_decay is None else log_decay[:, t]
        return step(q[:, t], k[:, t], v[:, t], beta[:, t], decay, state)

    return loop(take, start_state(state, k, v), v.shape[1], resets)


def chunked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Computes whole rows; a triangular system gives the values that a chunk writes (arXiv 2412.06464, section 3.3).

    With U and V the chunk's u and v as rows, G the sums of g within the chunk and S_0 the state before the chunk:
    (I + A) U = diag(beta) (V - diag(exp G) K S_0), where A_ij = beta_i exp(G_i - G_j) k_i . k_j for j < i.

    Computes in float32 (float64 for values in float64). For the backward pass it keeps the inputs and one state per
    segment, and recomputes the rest. It can be differentiated once.

    Args:
        q: Queries, scaled.
        k: Keys, usually of length 1.
        v: Values.
        beta: Share of the value held for the key that is replaced, from 0 to 1 (up to 2 with keys of length 1).
        log_decay: g, finite and at most 0; None: no decay.
        state: State after the previous tokens; None: zeros.
        resets: True for the first token of a document: the state is set to zero before this token.
        chunk_size: Tokens.

    Returns:
        The outputs in v's dtype, and the state after the last token in float32 (float64).
    """
    start = start_state(state, k, v)
    decays = start.new_zeros(1, 1, 1).expand(beta.shape) if log_decay is None else log_decay
    return run_in_chunks(_RECURRENCE, (q, k, v, beta, decays), start, resets, chunk_size)


def matrix(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H T T"]:
    """Returns the recurrence as an attention matrix M: o = M v from a state of zeros (one chunk of all tokens).

    Args:
        q: Queries, scaled.
        k: Keys.
        beta: As of `chunked`.
        log_decay: As of `chunked`.
        resets: As of `chunked`.

    Returns:
        Row t: the weights of all tokens in the output of token t. float32 (float64).
    """
    dtype = compute_dtype(q)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = (x.to(dtype).transpose(1, 2) for x in (q, k))
        strengths = beta.to(dtype).transpose(1, 2)
        decays = torch.zeros_like(strengths) if log_decay is None else log_decay.to(dtype).transpose(1, 2)
        pairs = within_documents(pairwise_decay(decays), resets)
        system = (keys @ keys.mT * pairs * strengths[..., None]).tril(-1)
        taken = torch.linalg.solve_triangular(
            system, queries @ keys.mT * pairs, upper=False, left=False, unitriangular=True
        )
        return taken * strengths[..., None, :]


class _Chunks(NamedTuple):
    """Holds a segment's inputs by chunk, row and head (X), and token, and their decays."""

    q: Float[Tensor, "N X C K"]
    k: Float[Tensor, "N X C K"]
    v: Float[Tensor, "N X C V"]
    beta: Float[Tensor, "N X C 1"]
    pairs: Float[Tensor, "N X C C"]  # from token to token of a chunk
    into: Float[Tensor, "N X C 1"]  # from the state before the chunk to a token
    onto: Float[Tensor, "N X C 1"]  # from a token to the state after the chunk
    across: Float[Tensor, "N X 1 1"]  # from the state before the chunk to the state after it


class _Written(NamedTuple):
    """Holds the values that a segment's tokens write into the states, and intermediate results for gradients."""

    likeness: Float[Tensor, "N X C C"]  # of keys: K K^T
    system: Float[Tensor, "N X C C"]  # A; the solver takes its diagonal as 1
    readers: Float[Tensor, "N X C K"]  # (I + A)^-1 diag(beta exp G) K
    states: Float[Tensor, "N X K V"]  # before each chunk
    u: Float[Tensor, "N X C V"]


def _read(inputs: Inputs, numbers: Tensor | None, segment: Segment) -> _Chunks:
    dtype = compute_dtype(inputs[2])
    *of_tokens, decays = (to_chunks(x, segment, dtype) for x in inputs)
    sums = decays.cumsum(-1)
    until = functional.pad(suffix_sums(decays, -1)[..., 1:], (0, 1))
    factors = (pairwise_decay(decays), sums.exp(), until.exp_(), sums[..., -1].exp())
    if numbers is not None:
        factors = (factor * seen for factor, seen in zip(factors, look(numbers, segment), strict=True))
    pairs, into, onto, across = (factor.flatten(1, 2) for factor in factors)
    queries, keys, values, strengths = (x.flatten(1, 2) for x in of_tokens)
    return _Chunks(
        queries,
        keys,
        values,
        strengths[..., None],
        pairs,
        into[..., None],
        onto[..., None],
        across[..., None, None],
    )


def _write(chunks: _Chunks, start: Float[Tensor, "X K V"]) -> tuple[_Written, Float[Tensor, "X K V"]]:
    """Solves the chunks' systems without the states before the chunks, and then computes the states in order."""
    likeness = chunks.k @ chunks.k.mT
    system = (likeness * chunks.pairs).mul_(chunks.beta)
    size = chunks.v.shape[-1]
    known = torch.cat((chunks.v * chunks.beta, chunks.k * (chunks.beta * chunks.into)), dim=-1)
    # Transposed, because LAPACK stores matrices by columns: this avoids a copy.
    solved = torch.linalg.solve_triangular(system.mT, known.mT, upper=True, left=False, unitriangular=True).mT
    u, readers = solved[..., :size], solved[..., size:]
    writers = (chunks.k * chunks.onto).mT
    states = torch.empty(*writers.shape[:-1], size, dtype=u.dtype, device=u.device)
    for n in range(len(u)):
        states[n] = start
        u[n].baddbmm_(readers[n], start, alpha=-1.0)
        start = (start * chunks.across[n]).baddbmm_(writers[n], u[n])
    return _Written(likeness, system, readers, states, u), start


def _run(chunks: _Chunks, start: Float[Tensor, "B H K V"]) -> tuple[Tensor, Tensor]:
    written, leaving = _write(chunks, start.flatten(0, 1))
    found = (chunks.q @ written.states).mul_(chunks.into)
    found += (chunks.q @ chunks.k.mT).mul_(chunks.pairs) @ written.u
    return found.unflatten(1, start.shape[:2]), leaving.unflatten(0, start.shape[:2])


def _differentiate(
    chunks: _Chunks,
    start: Float[Tensor, "B H K V"],
    d_found: Float[Tensor, "N B H C V"],
    d_leaving: Float[Tensor, "B H K V"],
    wanted: tuple[bool, ...],
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Returns the gradients of one segment: of q, k, v, beta, the log decays, and the state at its start."""
    heads = start.shape[:2]
    start, d_found, d_leaving = start.flatten(0, 1), d_found.flatten(1, 2), d_leaving.flatten(0, 1)
    q, k, v, beta, pairs, into, onto, across = chunks
    (likeness, system, readers, states, u), _ = _write(chunks, start)

    scores = q @ k.mT
    d_u = (scores * pairs).mT @ d_found
    d_found_into = d_found * into
    d_states = q.mT @ d_found_into
    writers = k * onto
    d_written = torch.empty_like(d_states)
    for n in reversed(range(len(d_states))):
        d_written[n] = d_leaving
        d_u[n].baddbmm_(writers[n], d_leaving)
        d_leaving = torch.addcmul(d_states[n], across[n], d_leaving)
        d_leaving.baddbmm_(readers[n].mT, d_u[n], alpha=-1.0)

    d_known = torch.linalg.solve_triangular(system.mT, d_u, upper=True, unitriangular=True)
    d_scores = (d_found @ u.mT).mul_(pairs)
    d_likeness = (d_known @ u.mT).mul_(pairs).tril_(-1).neg_()  # multiplied by beta below
    d_q_carried = d_found_into @ states.mT
    d_k_read = (d_known * into) @ states.mT
    d_k_written = (u @ d_written.mT).mul_(onto)
    held = (k * d_k_read).sum(-1, keepdim=True)

    from_pairs = likeness.mul_(d_likeness)
    d_beta = from_pairs.sum(-1, keepdim=True) + (d_known * v).sum(-1, keepdim=True) - held
    d_likeness *= beta
    d_q = d_scores @ k + d_q_carried
    d_k = (d_likeness + d_likeness.mT) @ k
    d_k += d_scores.mT @ q
    d_k += d_k_written
    d_k -= d_k_read * beta

    # The term of a token with itself does not decay. Without its removal it would hide the others under strong decay.
    d_pairs = (from_pairs * beta).addcmul_(d_scores, scores)
    d_pairs.diagonal(dim1=-2, dim2=-1).zero_()
    kept = (k * d_k_written).sum(-1)
    d_sums = d_pairs.sum(-1) - d_pairs.sum(-2) + (q * d_q_carried).sum(-1) - (held * beta).squeeze(-1) - kept
    d_sums[..., -1] += kept.sum(-1) + (states * d_written).sum(dim=(2, 3)) * across[..., 0, 0]
    grads = (d_q, d_k, d_known * beta, d_beta.squeeze(-1), suffix_sums(d_sums, -1))
    return tuple(grad.unflatten(1, heads) for grad in grads), d_leaving.unflatten(0, heads)


_RECURRENCE = InChunks(_read, _run, _differentiate)
