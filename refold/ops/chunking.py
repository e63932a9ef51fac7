"""Layout of tokens in chunks, `[N, B, H, C, .]` for batched products, with decays and document masks in chunks."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

CPU_SEGMENT_NUMBERS = 2**18
"""Elements of a `[N, B, H, C, C]` tensor of one segment on a CPU: enough to be fast, few enough for the cache."""
DEVICE_SEGMENT_NUMBERS = 2**25
"""Elements of a `[N, B, H, C, C]` tensor of one segment on other devices, which need larger operations."""


class Segment(NamedTuple):
    """Tokens `start` to `stop` that are processed at once: a whole number of chunks of `chunk` tokens."""

    start: int
    stop: int
    chunk: int


def segments(x: Float[Tensor, "B T H V"], chunk_size: int) -> Iterator[Segment]:
    """Cuts rows into segments of whole chunks; the remaining tokens become one shorter chunk, without padding."""
    batch, tokens, heads = x.shape[:3]
    whole = tokens - tokens % chunk_size
    numbers = CPU_SEGMENT_NUMBERS if x.device.type == "cpu" else DEVICE_SEGMENT_NUMBERS
    stride = max(numbers // max(batch * heads * chunk_size**2, 1), 1) * chunk_size
    for start in range(0, whole, stride):
        yield Segment(start, min(start + stride, whole), chunk_size)
    if whole < tokens:
        yield Segment(whole, tokens, tokens - whole)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of the computations and states of recurrences: float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_chunks(x: Float[Tensor, "B T H *X"], segment: Segment, dtype: torch.dtype) -> Float[Tensor, "N B H C *X"]:
    """Returns a segment's tokens by chunk and head, contiguous."""
    return _chunked_view(x, segment).to(dtype).contiguous()


def put_chunks(x: Float[Tensor, "B T H *X"], segment: Segment, chunks: Float[Tensor, "N B H C *X"]) -> None:
    """Writes chunks to their places in a row, the inverse of `to_chunks`; padding is dropped."""
    _chunked_view(x, segment).copy_(chunks[:, :, :, : segment.chunk])


def _chunked_view(x: Float[Tensor, "B T H *X"], segment: Segment) -> Float[Tensor, "N B H C *X"]:
    return x[:, segment.start : segment.stop].unflatten(1, (-1, segment.chunk)).transpose(0, 1).transpose(2, 3)


def suffix_sums(x: Tensor, dim: int) -> Tensor:
    """Returns, for each index of a dimension, the sum of the elements from this index to the end."""
    return x.flip(dim).cumsum(dim).flip(dim)


class Sight(NamedTuple):
    """Masks for documents: False if another document begins between the two places. The head dimension has size 1.

    Attributes:
        pairs: Between two tokens of a chunk, in any order.
        before: Between the state before the chunk and the chunk's tokens.
        after: Between the chunk's tokens and the state after it.
        across: Between the state before the chunk and the state after it.
    """

    pairs: Bool[Tensor, "N B 1 C C"]
    before: Bool[Tensor, "N B 1 C"]
    after: Bool[Tensor, "N B 1 C"]
    across: Bool[Tensor, "N B 1"]


def look(numbers: Int[Tensor, "B T"], segment: Segment) -> Sight:
    """Returns the document masks of a segment's chunks.

    Args:
        numbers: Document numbers of the row's tokens, from `number_documents`.
        segment: The segment.
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
    """Returns x_{j+1} + ... + x_i for j <= i, else -inf. No sum is a difference of long sums, which loses digits."""
    later = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).triu()
    sums = x[..., :, None].masked_fill(later, 0.0).cumsum(-2)
    return sums.masked_fill_(later.triu(1), -torch.inf)


def pairwise_decay(decays: Float[Tensor, "*X C"], block: int = 16) -> Float[Tensor, "*X C C"]:
    """Returns exp(g_{j+1} + ... + g_i) for j <= i, else 0.

    For tokens of different blocks the result is the product of the decay to the start of the later block and the decay
    from there. This needs far fewer exponentials than pairs, and no exponential is above 1. No sum is a difference of
    longer sums, so weak decays keep their digits beside strong decays.
    """
    size = decays.shape[-1]
    if size <= block:
        return segment_sums(decays).exp_()
    blocks = functional.pad(decays, (0, -size % block)).unflatten(-1, (-1, block))
    sums = blocks.cumsum(-1)
    until = functional.pad(suffix_sums(blocks, -1)[..., 1:], (0, 1))
    # Sums end at the start of a block, so they cover one block less; the first block is reached by no other.
    between = functional.pad(segment_sums(sums[..., -1])[..., :-1, :], (0, 0, 1, 0), value=-torch.inf)
    reach = (between[..., None] + until[..., None, :, :]).exp_().flatten(-2)
    pairs = sums.exp()[..., None] * reach[..., None, :]
    within = segment_sums(blocks).exp_()
    pairs.unflatten(-1, (-1, block)).diagonal(dim1=-4, dim2=-2).copy_(within.movedim(-3, -1))
    return pairs.flatten(-3, -2)[..., :size, :size]


def cut(tokens: int, size: int) -> list[slice]:
    """Returns slices of `size` tokens that cover a row, the last may be shorter; one slice in an exported graph."""
    if torch.compiler.is_exporting():
        return [slice(0, tokens)]
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
