"""Launches: spans of one kind as tensors, run together."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from refold.engine.page_plan import Spans
from refold.engine.pools import Pools
from refold.engine.sequence import Span
from refold.modeling.model import RefoldForCausalLM
from refold.modeling.rows import RowRange
from refold.nn.mixers.batch import Batch
from refold.nn.mixers.store import Store
from refold.nn.rotary import Rotary, Rotation

Int64Array = npt.NDArray[np.int64]


class Rotations:
    """Cosines and sines of positions, for all ropes of a stack; the tables grow with the longest sequence.

    Args:
        model: The model.
    """

    def __init__(self, model: RefoldForCausalLM):
        self._rotaries = cast("list[Rotary]", list(model.model.rotaries))
        self._dtype, self._device = model.dtype, model.device
        self._length = 0
        self._tables: list[tuple[Tensor, ...]] = []

    def at(self, positions: Int64Array, num_rows: int) -> tuple[Rotation, ...]:
        """Returns the rotation of each rope at positions, `[num_rows, T, 1, K]`."""
        if not self._rotaries:
            return ()
        last = int(positions.max())
        if last >= self._length:
            # Up to the model's positions and no further: some ropes depend on the length of the longest text.
            most = max((rotary.max_positions for rotary in self._rotaries), default=0)
            self._length = most if last < most else 2 * last
            every = torch.arange(self._length, device=self._device).unsqueeze(0)
            self._tables = [tuple(table[0] for table in rotary(every, self._dtype)) for rotary in self._rotaries]
        wanted = torch.from_numpy(positions).to(self._device)
        return tuple(
            cast("Rotation", tuple(table.index_select(0, wanted).unflatten(0, (num_rows, -1)) for table in tables))
            for tables in self._tables
        )


class Leaving(NamedTuple):
    """Spans of one depth whose predictions are wanted.

    Attributes:
        depth: Number of depths they have run.
        spans: In order.
        streams: `[R, D]`, of the last `wanted` tokens of each.
    """

    depth: int
    spans: list[Span]
    streams: Float[Tensor, "R D"]


class LaunchPiece(NamedTuple):
    """Neighbouring spans of a launch that run by themselves.

    Attributes:
        spans: In order.
        rows: Their rows of the launch's tensors.
        batch: Their rotations.
        store: Their memory.
    """

    spans: list[Span]
    rows: slice
    batch: Batch
    store: Store


_SECOND = ThreadPoolExecutor(1, "refold-second-half")
"""Runs the second half of launches whose attention is computed elsewhere."""


class Launch:
    """Spans that run segments together as long as all of them go on.

    Args:
        model: The model.
        pools: Its memory.
        rotations: Of the model.
        spans: Of one kind; for stacks with recurrent mixers all of one length.
        flat: Whether every token is a row of its own, which stacks without recurrent mixers allow.
    """

    def __init__(self, model: RefoldForCausalLM, pools: Pools, rotations: Rotations, spans: Sequence[Span], flat: bool):
        self._stack, self.flat = model.model, flat
        self.spans = sorted(
            spans, key=lambda span: (span.segment.depths.start, span.sequence.adapters_number, span.length)
        )
        lengths = [span.length for span in self.spans]
        starts = np.array([span.start for span in self.spans], dtype=np.int64)
        counts = np.array(lengths, dtype=np.int64)
        self.num_tokens = int(counts.sum())
        ends = np.cumsum(counts)
        self._begins = (ends - counts).tolist()
        positions = np.arange(self.num_tokens, dtype=np.int64) + np.repeat(starts - (ends - counts), counts)
        num_rows = self.num_tokens if flat else len(self.spans)
        self.streams = self._gather(lengths).view(num_rows, -1, self._stack.config.hidden_size)
        rows = np.array([span.sequence.row for span in self.spans], dtype=np.int64)
        self._pieces: list[LaunchPiece] = []
        for cut in _halves(counts) if flat and pools.keeper.overlaps else [slice(0, len(counts))]:
            first, last = int(ends[cut.start] - counts[cut.start]), int(ends[cut.stop - 1])
            own = slice(first, last) if flat else cut
            batch = Batch(rotations=rotations.at(positions[first:last], own.stop - own.start))
            store: Store = pools.open(Spans(rows[cut], starts[cut], counts[cut], flat))
            self._pieces.append(LaunchPiece(self.spans[cut], own, batch, store))

    def run(self) -> None:
        """Runs the next segment of every span."""
        if len(self._pieces) == 1:
            self.streams = self._run(self._pieces[0])
        else:
            # While one half waits for the attention of a depth, the other computes.
            second = _SECOND.submit(self._run, self._pieces[1])
            try:
                first = self._run(self._pieces[0])
            finally:
                second.exception()
            self.streams = torch.cat((first, second.result()))
        for span in self.spans:
            span.place += 1

    @torch.inference_mode()
    def _run(self, piece: LaunchPiece) -> Float[Tensor, "B T D"]:
        """Runs the next segment of some spans and returns their streams."""
        streams = self.streams[piece.rows]
        rows = self._ranges(piece)
        if len(rows) == 1:
            depths, _, modules = rows[0]
            return self._stack.run(depths, streams, piece.batch, piece.store, modules=modules).hidden_states
        return self._stack.run_rows(rows, streams, piece.batch, piece.store)

    def fill(self, depths: Sequence[int]) -> None:
        """Writes the keys and values of depths that are skipped, from the present streams."""
        for piece in self._pieces:
            rows = self._ranges(piece)
            for depth in depths:
                self._stack.fill(depth, rows, self.streams[piece.rows], piece.batch, piece.store)

    def _ranges(self, piece: LaunchPiece) -> list[RowRange]:
        """Returns the runs of rows with the same next segment and the same adapters."""
        ranges = []
        for (depths, _), spans in groupby(
            piece.spans, key=lambda span: (span.segment.depths, span.sequence.adapters_number)
        ):
            members = list(spans)
            adapters = members[0].sequence.request.adapters
            size = sum(span.length for span in members) if self.flat else len(members)
            ranges.append(RowRange(depths, size, None if adapters is None else adapters.depths))
        return ranges

    def stream(self, index: int) -> Float[Tensor, "n D"]:
        """Returns the residual stream of one span."""
        tokens = self.streams.view(self.num_tokens, -1)
        return tokens[self._begins[index] : self._begins[index] + self.spans[index].length]

    def asked(self, chosen: Sequence[int]) -> list[Leaving]:
        """Returns the streams of the last tokens of chosen spans, by depth.

        Args:
            chosen: Indices of spans, of each of which predictions are wanted.
        """
        tokens = self.streams.view(self.num_tokens, -1)
        found: dict[int, list[int]] = {}
        for index in chosen:
            span = self.spans[index]
            found.setdefault(span.sequence.passes.segments[span.place - 1].depths.stop, []).append(index)
        leaving = []
        for depth, indices in found.items():
            spans = [self.spans[index] for index in indices]
            picked: list[int] = []
            for index, span in zip(indices, spans, strict=True):
                end = self._begins[index] + span.length
                picked.extend(range(end - span.wanted, end))
            if len(picked) == self.num_tokens:
                streams = tokens
            else:
                streams = tokens.index_select(0, torch.tensor(picked, device=tokens.device))
            leaving.append(Leaving(depth, spans, streams))
        return leaving

    def _gather(self, lengths: Sequence[int]) -> Float[Tensor, "N D"]:
        """Returns the residual stream of all tokens: embeddings of those that begin, streams of the others."""
        pieces, ids = [], list[int]()
        for span in self.spans:
            if span.stream is None:
                ids.extend(span.sequence.ids(span.start, span.length))
            else:
                pieces.append(span.stream)
        embedded = self._embed(ids) if ids else None
        if not pieces:
            assert embedded is not None
            return embedded
        if embedded is None:
            return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        joined, taken = [], 0
        for span, length in zip(self.spans, lengths, strict=True):
            if span.stream is None:
                joined.append(embedded[taken : taken + length])
                taken += length
            else:
                joined.append(span.stream)
        return torch.cat(joined)

    def _embed(self, ids: list[int]) -> Float[Tensor, "N D"]:
        table = self._stack.get_input_embeddings()
        found = cast("nn.Module", table)(torch.tensor(ids, device=self._stack.device))
        scale = self._stack.embedding_scale
        return found if scale == 1.0 else found * torch.tensor(scale, dtype=found.dtype)


def _halves(lengths: Int64Array) -> list[slice]:
    """Returns two cuts of spans with about equally many tokens; one if there is one span."""
    if len(lengths) == 1:
        return [slice(0, 1)]
    before = np.cumsum(lengths)
    middle = int(np.argmin(np.abs(before[:-1] - before[-1] / 2))) + 1
    return [slice(0, middle), slice(middle, len(lengths))]
