"""The recurrence with one decay per head, used by Mamba-2, retention (constant decay) and linear attention (no decay).

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t

State-space duality is arXiv 2405.21060 (equations 1 and 16; our exp(g) is its a, our q, k, v its C, B, X), retention
arXiv 2307.08621 (equation 5; exp(g) is its gamma), linear attention arXiv 2006.16236 (equations 16 to 20, without its
normaliser). Queries and keys may have fewer heads than values (G groups, Mamba-2): head h reads group h // (H // G).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from refold.ops.chunking import (
    Segment,
    Sight,
    compute_dtype,
    look,
    pairwise_decay,
    suffix_sums,
    to_chunks,
)
from refold.ops.documents import within_documents
from refold.ops.recurrence import InChunks, Inputs, loop, run_in_chunks, start_state


def step(
    q: Float[Tensor, "B G K"],
    k: Float[Tensor, "B G K"],
    v: Float[Tensor, "B H V"],
    log_decay: Float[Tensor, "B H"] | Float[Tensor, " H"] | None,
    state: Float[Tensor, "B H K V"] | None,
) -> tuple[Float[Tensor, "B H V"], Float[Tensor, "B H K V"]]:
    """Updates the state with one token and reads the output.

    Args:
        q: Query, scaled.
        k: Key.
        v: Value.
        log_decay: g, at most 0; None: no decay.
        state: float32, or float64 with values in float64; None: zeros.

    Returns:
        The output in v's dtype, and the new state.
    """
    dtype = compute_dtype(v)
    repeats = v.shape[1] // q.shape[1]
    with torch.autocast(v.device.type, enabled=False):
        written = k.to(dtype)[:, :, None, :, None] * v.to(dtype).unflatten(1, (-1, repeats))[:, :, :, None, :]
        new = written.flatten(1, 2)
        if state is not None:
            decay = 1.0 if log_decay is None else log_decay.to(dtype).exp()[..., None, None]
            new = new + decay * state
        out = q.to(dtype)[:, :, None, None, :] @ new.unflatten(1, (-1, repeats))
    return out.squeeze(-2).flatten(1, 2).to(v.dtype), new


def naive(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, " H"] | None,
    state: Float[Tensor, "B H K V"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Computes `chunked` token by token, as the reference for tests; same arguments and returns."""

    def take(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        decay = log_decay[:, t] if log_decay is not None and log_decay.dim() == 3 else log_decay
        return step(q[:, t], k[:, t], v[:, t], decay, state)

    return loop(take, start_state(state, k, v), v.shape[1], resets)


def chunked(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, " H"] | None,
    state: Float[Tensor, "B H K V"] | None = None,
    resets: Bool[Tensor, "B T"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Computes whole rows: quadratic within chunks, recurrent between chunks (arXiv 2405.21060, section 6).

    Computes in float32 (float64 for values in float64). For the backward pass it keeps the inputs and one state per
    segment, and recomputes the rest. It can be differentiated once.

    Args:
        q: Queries, scaled.
        k: Keys.
        v: Values.
        log_decay: g, finite and at most 0, per token or per head; None: no decay.
        state: State after the previous tokens; None: zeros.
        resets: True for the first token of a document: the state is set to zero before this token.
        chunk_size: Tokens.

    Returns:
        The outputs in v's dtype, and the state after the last token in float32 (float64).
    """
    start = start_state(state, k, v)
    decays = start.new_zeros(1) if log_decay is None else log_decay
    return run_in_chunks(_RECURRENCE, (q, k, v, decays), start, resets, chunk_size)


def matrix(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, " H"] | None,
    resets: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H T T"]:
    """Returns the recurrence as an attention matrix M: o = M v from a state of zeros (arXiv 2405.21060, equation 16).

    Args:
        q: Queries, scaled.
        k: Keys.
        log_decay: As of `chunked`; with None the number of heads is the number of groups.
        resets: As of `chunked`.

    Returns:
        Row t: the weights of all tokens in the output of token t. float32 (float64).
    """
    dtype = compute_dtype(q)
    groups = q.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(dtype).transpose(1, 2) @ k.to(dtype).permute(0, 2, 3, 1)
        if log_decay is None:
            mixing = scores.tril()
        else:
            per_token = log_decay.to(dtype).expand(*q.shape[:2], -1)
            weights = pairwise_decay(per_token.transpose(1, 2))
            mixing = (scores[:, :, None] * weights.unflatten(1, (groups, -1))).flatten(1, 2)
        return within_documents(mixing, resets)


class _Chunks(NamedTuple):
    """Holds a segment's inputs by chunk, group, head of the group (R) and token, and their decays.

    A decay that is the same for all chunks, rows or heads has size 1 in this dimension.
    """

    q: Float[Tensor, "N B G C K"]
    k: Float[Tensor, "N B G C K"]
    v: Float[Tensor, "N B G R C V"]
    pairs: Float[Tensor, "#N #B #G #R C C"]  # from token to token of a chunk
    into: Float[Tensor, "#N #B #G #R C"]  # from the state before the chunk to a token
    onto: Float[Tensor, "#N #B #G #R C"]  # from a token to the state after the chunk
    across: Float[Tensor, "N #B #G 1 #R 1"]  # from the state before the chunk to the state after it
    values: Float[Tensor, "N B G C RV"]  # as the leaving state takes them

    def states(self, start: Float[Tensor, "B G K R V"]) -> Float[Tensor, "S B G K R V"]:
        """Returns the state before each chunk, and the state after the last chunk."""
        written = (self.k.mT @ self.values).unflatten(-1, self.v.shape[3::2])
        states = written.new_empty(len(written) + 1, *start.shape)
        states[0] = start
        for n, new in enumerate(written):
            torch.addcmul(new, self.across[n], states[n], out=states[n + 1])
        return states


def _read(inputs: Inputs, numbers: Tensor | None, segment: Segment) -> _Chunks:
    q, k, v, log_decay = inputs
    dtype, groups = compute_dtype(v), q.shape[2]
    if log_decay.dim() == 3:
        decays = to_chunks(log_decay, segment, dtype).unflatten(2, (groups, -1))
    else:
        per_head = log_decay.to(dtype).view(1, 1, groups if len(log_decay) > 1 else 1, -1, 1)
        decays = per_head.expand(-1, -1, -1, -1, segment.chunk)
    sums = decays.cumsum(-1)
    pairs = pairwise_decay(decays)
    until = functional.pad(suffix_sums(decays, -1)[..., 1:], (0, 1))
    into, onto, across = sums.exp(), until.exp_(), sums[..., -1].exp()
    if numbers is not None:
        sight = Sight(*(mask[:, :, :, None] for mask in look(numbers, segment)))
        pairs, into, onto, across = pairs * sight.pairs, into * sight.before, onto * sight.after, across * sight.across
    queries, keys = to_chunks(q, segment, dtype), to_chunks(k, segment, dtype)
    values = to_chunks(v, segment, dtype).unflatten(2, (groups, -1))
    across = across[:, :, :, None, :, None].expand(len(values), -1, -1, -1, -1, -1)
    return _Chunks(queries, keys, values, pairs, into, onto, across, _columns(values * onto[..., None]))


def _mix(chunks: _Chunks) -> Float[Tensor, "N B G R C C"]:
    """Returns the weight of each token in the outputs of the tokens of its chunk."""
    scores = (chunks.q @ chunks.k.mT)[:, :, :, None]
    return scores.mul_(chunks.pairs) if chunks.v.shape[3] == 1 else scores * chunks.pairs


def _run(chunks: _Chunks, start: Float[Tensor, "B H K V"]) -> tuple[Tensor, Tensor]:
    states = chunks.states(_to_groups(start, chunks.q.shape[2]))
    found = _mix(chunks) @ chunks.v
    found.addcmul_(chunks.into[..., None], _rows(chunks.q @ states[:-1].flatten(-2), chunks.v))
    return found.flatten(2, 3), _from_groups(states[-1].clone())


def _differentiate(
    chunks: _Chunks,
    start: Float[Tensor, "B H K V"],
    d_found: Float[Tensor, "N B H C V"],
    d_leaving: Float[Tensor, "B H K V"],
    wanted: tuple[bool, ...],
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Returns the gradients of one segment: of q, k, v, the log decays, and the state at its start."""
    start, d_leaving = (_to_groups(state, chunks.q.shape[2]) for state in (start, d_leaving))
    d_found, with_decay = d_found.unflatten(2, chunks.v.shape[2:4]), wanted[3]
    states = chunks.states(start)[:-1]
    into_state = _columns(d_found * chunks.into[..., None])
    found = (chunks.q.mT @ into_state).unflatten(-1, states.shape[-2:])
    d_states = found.new_empty(len(found) + 1, *start.shape)
    d_states[-1] = d_leaving
    for n in reversed(range(len(found))):
        torch.addcmul(found[n], chunks.across[n], d_states[n + 1], out=d_states[n])
    d_written = d_states[1:]

    d_mix = d_found @ chunks.v.mT
    mix = _mix(chunks)
    # A token's own term does not decay; left in, it would drown the others where decay is strong.
    d_pairs = (d_mix * mix).tril_(-1) if with_decay else None
    d_scores = d_mix.mul_(chunks.pairs)
    d_scores = d_scores.sum(3) if d_scores.shape[3] > 1 else d_scores[:, :, :, 0]
    d_q_carried = into_state @ states.flatten(-2).mT
    d_q = (d_scores @ chunks.k).add_(d_q_carried)
    d_k = (d_scores.mT @ chunks.q).add_(chunks.values @ d_written.flatten(-2).mT)
    d_v_carried = _rows(chunks.k @ d_written.flatten(-2), chunks.v) * chunks.onto[..., None]
    d_v = (mix.mT @ d_found).add_(d_v_carried)
    if d_pairs is None:
        return (d_q, d_k, d_v.flatten(2, 3), None), _from_groups(d_states[0])

    d_sums = d_pairs.sum(-1) - d_pairs.sum(-2)
    if d_sums.shape[3] == 1:
        d_sums += (chunks.q * d_q_carried).sum(-1)[:, :, :, None]
    else:
        carried = _rows(chunks.q @ states.flatten(-2), chunks.v)
        d_sums += (carried * d_found).sum(-1) * chunks.into
    kept = (chunks.v * d_v_carried).sum(-1)
    d_sums -= kept
    d_sums[..., -1] += kept.sum(-1) + ((states * d_written).sum(dim=(3, 5), keepdim=True) * chunks.across)[..., 0, :, 0]
    d_decay = suffix_sums(d_sums, -1).flatten(2, 3)
    return (d_q, d_k, d_v.flatten(2, 3), d_decay), _from_groups(d_states[0])


def _columns(x: Float[Tensor, "N B G R C V"]) -> Float[Tensor, "N B G C RV"]:
    """Concatenates the heads of a group, so that one product with the group's keys or queries covers all of them."""
    return x.transpose(3, 4).flatten(-2)


def _rows(x: Float[Tensor, "N B G C RV"], like: Float[Tensor, "N B G R C V"]) -> Float[Tensor, "N B G R C V"]:
    """Reverses `_columns`."""
    return x.unflatten(-1, like.shape[3::2]).transpose(3, 4)


def _to_groups(state: Float[Tensor, "B H K V"], groups: int) -> Float[Tensor, "B G K R V"]:
    return state.unflatten(1, (groups, -1)).transpose(2, 3)


def _from_groups(state: Float[Tensor, "B G K R V"]) -> Float[Tensor, "B H K V"]:
    return state.transpose(2, 3).flatten(1, 2)


_RECURRENCE = InChunks(_read, _run, _differentiate)
