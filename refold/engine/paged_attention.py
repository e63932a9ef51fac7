"""Attention over pages: scores page by page, one softmax for each span, values page by page."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.engine.page_plan import LONG_SPAN, PageSet, SpanRun
from refold.nn.mixers.key_values import KeyValue

COPIED_BYTES = 4 << 20
"""Bytes of pages that are copied at a time: fresh memory of a larger piece costs more than the copy."""


class Scoring(NamedTuple):
    """How scores come from queries and keys.

    Attributes:
        scaling: Factor of the scores.
        softcap: Bound of the scores, approached by a tanh; None: none.
        prefix: Keys and values `[1, G, P, K]` that every token attends to besides tokens.
    """

    scaling: float
    softcap: float | None
    prefix: KeyValue | None


def attend_run(
    query: Float[Tensor, "spans G R T K"], keys: Tensor, values: Tensor, run: SpanRun, scoring: Scoring
) -> Float[Tensor, "spans G R T K"]:
    """Attends to the pages of spans of equal length.

    Args:
        query: R query heads for each key-value head.
        keys: A plane `[pages, G, page_size, K]`.
        values: Likewise.
        run: The spans.
        scoring: Scale, soft-cap and prefix.
    """
    if run.length >= LONG_SPAN:
        return _attend_long(query, keys, values, run, scoring)
    return _attend_pages(query, keys, values, run, scoring)


def _attend_pages(
    query: Float[Tensor, "spans G R T K"], keys: Tensor, values: Tensor, run: SpanRun, scoring: Scoring
) -> Float[Tensor, "spans G R T K"]:
    spans, groups, heads, length, size = query.shape
    per_head, page_size, blocks = heads * length, keys.shape[2], run.num_blocks
    scaled = (query * scoring.scaling).reshape(spans, groups, per_head, size)
    entries = [_ask(scaled, keys, each) for each in run.sets]
    scores = entries[0] if len(entries) == 1 else torch.cat(entries)
    if run.entry is not None:
        scores = scores.index_select(0, run.entry)
    table = scores.view(spans, blocks, groups * per_head, page_size).transpose(1, 2)
    table = table.reshape(spans, groups, heads, length, blocks * page_size)
    weights, on_prefix = _weigh(table, scaled, run, scoring)
    by_block = weights.view(spans, groups * per_head, blocks, page_size).transpose(1, 2)
    by_entry = by_block.reshape(spans * blocks, -1)
    if run.slot is not None:
        by_entry = by_entry.index_select(0, run.slot)
    # One place more than spans: pages of no span, between those of the spans, go there and are left out.
    found = query.new_zeros(spans + 1, groups * per_head * size) if run.slot is not None else None
    begin = 0
    for each in run.sets:
        num_spans = 1 if each.owner is not None or each.spans is None else len(each.spans)
        end = begin + each.num_pages * num_spans
        mixed = _mix(by_entry[begin:end], values, each, num_spans)
        begin = end
        if found is None:
            found = mixed
        else:
            owner = each.spans if each.owner is None else each.owner
            assert owner is not None
            found.index_add_(0, owner, mixed)
    assert found is not None
    found = found[:spans].view(query.shape)
    return found if on_prefix is None else found + on_prefix.view(query.shape)


def _ask(
    query: Float[Tensor, "spans G X K"], keys: Float[Tensor, "P G size K"], pages: PageSet
) -> Float[Tensor, "entries scores"]:
    """Returns the scores of queries with the keys of a set of pages, an entry for each page (and span)."""
    _, groups, per_head, size = query.shape
    num_pages, common = pages.num_pages, pages.owner is None
    if not common:
        assert pages.spans is not None
        asked = query.reshape(len(query), -1).index_select(0, pages.spans)
    else:
        query = query if pages.spans is None else query.index_select(0, pages.spans)
        asked = query.transpose(0, 1).expand(num_pages, groups, len(query), per_head, size)
    scores = _times_pages(asked.reshape(num_pages * groups, -1, size), keys, pages, transposed=True)
    if common and len(query) > 1:
        scores = scores.view(num_pages, groups, len(query), -1).transpose(1, 2)
        return scores.reshape(num_pages * len(query), -1)
    return scores.view(num_pages, -1)


def _mix(
    weights: Float[Tensor, "entries weights"], values: Float[Tensor, "P G size K"], pages: PageSet, num_spans: int
) -> Float[Tensor, "places outputs"]:
    """Returns the values of a set of pages, weighted: for each page, or summed over common pages for each span."""
    _, groups, page_size, _ = values.shape
    num_pages = pages.num_pages
    if num_spans > 1:
        weights = weights.view(num_pages, num_spans, groups, -1).transpose(1, 2)
    mixed = _times_pages(weights.reshape(num_pages * groups, -1, page_size), values, pages, transposed=False)
    if pages.owner is not None:
        return mixed.view(num_pages, -1)
    summed = mixed.view(num_pages, groups, num_spans, -1).sum(dim=0)
    return summed.transpose(0, 1).reshape(num_spans, -1)


def _times_pages(
    states: Float[Tensor, "heads X A"], plane: Float[Tensor, "P G size K"], pages: PageSet, transposed: bool
) -> Float[Tensor, "heads X C"]:
    """Multiplies by each page's keys (transposed) or values. Pages that are copied are copied few at a time."""
    _, groups, page_size, size = plane.shape
    if pages.pages is None:
        read = plane[pages.low : pages.high].view(-1, page_size, size)
        return torch.bmm(states, read.transpose(1, 2) if transposed else read)
    step = max(1, COPIED_BYTES // (groups * page_size * size * plane.itemsize))
    found = states.new_empty(len(states), states.shape[1], page_size if transposed else size)
    for begin in range(0, pages.num_pages, step):
        copied = plane.index_select(0, pages.pages[begin : begin + step]).view(-1, page_size, size)
        part = slice(begin * groups, begin * groups + len(copied))
        torch.bmm(states[part], copied.transpose(1, 2) if transposed else copied, out=found[part])
    return found


def _attend_long(
    query: Float[Tensor, "1 G R T K"], keys: Tensor, values: Tensor, run: SpanRun, scoring: Scoring
) -> Float[Tensor, "1 G R T K"]:
    _, groups, heads, length, size = query.shape
    keys, values = (_in_order(plane, run) for plane in (keys, values))
    if query.dtype == torch.float32 and scoring.softcap is None and scoring.prefix is None:
        mask = None
        if not run.is_causal:
            mask = query.new_ones(length, run.num_keys, dtype=torch.bool)
            if run.hidden is not None:
                mask[:, run.first_hidden :] = ~run.hidden[0, 0, 0, :, : run.num_keys - run.first_hidden]
        found = nn.functional.scaled_dot_product_attention(
            query.reshape(1, groups * heads, length, size),
            keys,
            values,
            attn_mask=mask,
            is_causal=run.is_causal,
            scale=scoring.scaling,
            enable_gqa=heads > 1,
        )
        return found.view(query.shape)
    flat = (query * scoring.scaling).reshape(1, groups, heads * length, size)
    table = torch.matmul(flat, keys.transpose(2, 3)).view(1, groups, heads, length, -1)
    weights, on_prefix = _weigh(table, flat, run, scoring)
    found = torch.matmul(weights.view(1, groups, heads * length, -1), values).view(query.shape)
    return found if on_prefix is None else found + on_prefix.view(query.shape)


def _in_order(plane: Float[Tensor, "P G size K"], run: SpanRun) -> Float[Tensor, "1 G S K"]:
    """Returns the keys or values of the only span, token after token."""
    (pages,) = run.sets
    read = plane[pages.low : pages.high] if pages.pages is None else plane.index_select(0, pages.pages)
    return read.transpose(0, 1).flatten(1, 2)[None, :, : run.num_keys]


def _weigh(
    scores: Float[Tensor, "spans G R T S"], query: Float[Tensor, "spans G X K"], run: SpanRun, scoring: Scoring
) -> tuple[Float[Tensor, "spans G R T S"], Float[Tensor, "spans G X K"] | None]:
    """Returns the softmax of scores over tokens and prefix, computed in float32, and the prefix's share of the output.

    Args:
        scores: Changed in place.
        query: Scaled.
        run: The spans.
        scoring: Soft-cap and prefix.
    """
    if scoring.softcap is not None:
        scores = _cap(scores, scoring.softcap)
    if run.hidden is not None:
        part = scores[..., run.first_hidden :]
        part.masked_fill_(run.hidden[..., : part.shape[-1]], float("-inf"))
    if scoring.prefix is None:
        return scores.softmax(dim=-1), None
    key, value = scoring.prefix
    before = torch.matmul(query, key.transpose(2, 3))
    if scoring.softcap is not None:
        before = _cap(before, scoring.softcap)
    num_vectors, shape = before.shape[-1], scores.shape
    joined = torch.cat((before, scores.view(*before.shape[:-1], -1)), dim=-1).softmax(dim=-1)
    return joined[..., num_vectors:].reshape(shape), torch.matmul(joined[..., :num_vectors], value)


def _cap(scores: Tensor, softcap: float) -> Tensor:
    return scores.div_(softcap).tanh_().mul_(softcap)
