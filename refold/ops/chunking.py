"""Tokens in chunks, `[N, B, H, C, .]` for batched products, and what chunks see of each other across documents."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

CPU_SEGMENT_NUMBERS = 2**18
"""What a `[N, B, H, C, C]` holds while a segment is worked on: enough to be quick, little enough to stay in cache."""
DEVICE_SEGMENT_NUMBERS = 2**25
"""The same on other devices, which want more work at once."""


class Segment(NamedTuple):
    """Tokens `start` to `stop`: a whole number of chunks of `chunk` tokens, worked on at once."""

    start: int
    stop: int
    chunk: int


def segments(x: Float[Tensor, "B T H V"], chunk_size: int) -> Iterator[Segment]:
    """Cuts rows into segments of whole chunks; what is left at the end is a chunk of its own, so nothing is padded."""
    batch, tokens, heads = x.shape[:3]
    whole = tokens - tokens % chunk_size
    numbers = CPU_SEGMENT_NUMBERS if x.device.type == "cpu" else DEVICE_SEGMENT_NUMBERS
    stride = max(numbers // max(batch * heads * chunk_size**2, 1), 1) * chunk_size
    for start in range(0, whole, stride):
        yield Segment(start, min(start + stride, whole), chunk_size)
    if whole < tokens:
        yield Segment(whole, tokens, tokens - whole)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What recurrences compute in, and states are kept in: float32, or float64 where inputs are."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_chunks(x: Float[Tensor, "B T H *X"], segment: Segment, dtype: torch.dtype) -> Float[Tensor, "N B H C *X"]:
    """A segment's tokens laid out by chunk and head, contiguous."""
    return _chunked_view(x, segment).to(dtype).contiguous()


def put_chunks(x: Float[Tensor, "B T H *X"], segment: Segment, chunks: Float[Tensor, "N B H C *X"]) -> None:
    """Writes what `to_chunks` would have read; tokens of padding are left out."""
    _chunked_view(x, segment).copy_(chunks[:, :, :, : segment.chunk])


def _chunked_view(x: Float[Tensor, "B T H *X"], segment: Segment) -> Float[Tensor, "N B H C *X"]:
    return x[:, segment.start : segment.stop].unflatten(1, (-1, segment.chunk)).transpose(0, 1).transpose(2, 3)


def suffix_sums(x: Tensor, dim: int) -> Tensor:
    """At each place of a dimension the sum of what is there and after it."""
    return x.flip(dim).cumsum(dim).flip(dim)


class Sight(NamedTuple):
    """What is of one document: False where a document began in between. Heads are a size of 1.

    Attributes:
        pairs: Token by token within a chunk, order not regarded.
        before: The state that comes into the chunk, by the chunk's tokens.
        after: The chunk's tokens, by the state that leaves it.
        across: The state that comes in, by the state that leaves.
    """

    pairs: Bool[Tensor, "N B 1 C C"]
    before: Bool[Tensor, "N B 1 C"]
    after: Bool[Tensor, "N B 1 C"]
    across: Bool[Tensor, "N B 1"]


def look(numbers: Int[Tensor, "B T"], segment: Segment) -> Sight:
    """Compares the documents of a segment's tokens.

    Args:
        numbers: Of the row's tokens, from `number_documents`.
        segment: Where to look.
    """
    own = numbers[:, segment.start : segment.stop].unflatten(1, (-1, segment.chunk)).transpose(0, 1)
    first = numbers[None, :, segment.start - 1] if segment.start else torch.zeros_like(own[:1, :, 0])
    last = own[:, :, -1]
    incoming = torch.cat([first, last[:-1]])
    return Sight(
        pairs=(own[:, :, :, None] == own[:, :, None, :])[:, :, None],
        before=(own == incoming[:, :, None])[:, :, None],
        after=(own == last[:, :, None])[:, :, None],
        across=(last == incoming)[:, :, None],
    )


def segment_sums(x: Float[Tensor, "*X T"]) -> Float[Tensor, "*X T T"]:
    """x_{j+1} + ... + x_i for j <= i, else -inf. Each is summed by itself: differences of long sums lose digits."""
    later = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).triu()
    sums = x[..., :, None].masked_fill(later, 0.0).cumsum(-2)
    return sums.masked_fill_(later.triu(1), -torch.inf)


def pairwise_decay(decays: Float[Tensor, "*X C"], block: int = 16) -> Float[Tensor, "*X C C"]:
    """exp(g_{j+1} + ... + g_i) for j <= i, else 0.

    Between blocks it is the product of the way to the later block's start and the way from there: far fewer
    exponentials than pairs, none of them above 1. No sum is a difference of longer ones, so weak decays keep their
    digits beside strong ones.
    """
    size = decays.shape[-1]
    if size <= block:
        return segment_sums(decays).exp_()
    blocks = functional.pad(decays, (0, -size % block)).unflatten(-1, (-1, block))
    sums = blocks.cumsum(-1)
    until = functional.pad(suffix_sums(blocks, -1)[..., 1:], (0, 1))
    # To the start of a block, so one block fewer; nothing reaches the first.
    between = functional.pad(segment_sums(sums[..., -1])[..., :-1, :], (0, 0, 1, 0), value=-torch.inf)
    reach = (between[..., None] + until[..., None, :, :]).exp_().flatten(-2)
    pairs = sums.exp()[..., None] * reach[..., None, :]
    within = segment_sums(blocks).exp_()
    pairs.unflatten(-1, (-1, block)).diagonal(dim1=-4, dim2=-2).copy_(within.movedim(-3, -1))
    return pairs.flatten(-3, -2)[..., :size, :size]


def cut(tokens: int, size: int) -> list[slice]:
    """Returns a row's tokens in pieces of `size`, the last of the tokens left; one piece in a graph for any length."""
    if torch.compiler.is_exporting():
        return [slice(0, tokens)]
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
