"""Keepers of pages: they hold keys and values, and compute attention where these are."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from refold.engine.channel import Traffic
from refold.engine.key_layout import KeyLayout
from refold.engine.page_plan import PagePlan, SpanRun, Spans, plan_pages
from refold.engine.paged_attention import Scoring, attend_run
from refold.engine.pages import PageGroup, zeros
from refold.nn.mixers.key_values import KeyValue
from refold.nn.mixers.store import StorePart


class LaunchPages(ABC):
    """The pages of the spans of one launch."""

    @abstractmethod
    def append(
        self, parts: Sequence[StorePart], key: Float[Tensor, "B G T K"], value: Float[Tensor, "B G T K"]
    ) -> None:
        """Writes keys and values of the launch's tokens.

        Args:
            parts: Depths with their rows, which are neighbours, in order.
            key: Of these rows; of the heads that the depths make.
            value: Likewise.
        """

    @abstractmethod
    def attend(self, parts: Sequence[StorePart], query: Float[Tensor, "B H T K"]) -> Float[Tensor, "B T H K"]:
        """Attends to the keys of the launch's rows, and to the prefixes of the depths.

        Args:
            parts: As for `append`.
            query: Of these rows.
        """


class PageKeeper(ABC):
    """Holds the keys and values of all pages; block tables stay with the pools.

    Attributes:
        num_shares: Number of shares of the rows, each of which has pages of its own: row r belongs to share
            `r % num_shares`.
        overlaps: Whether attention is computed elsewhere, so that two halves of a launch run faster than the whole.
    """

    num_shares: int = 1
    overlaps: bool = False

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of all pages."""

    @property
    def traffic(self) -> Traffic:
        """Bytes to and from attention workers."""
        return Traffic()

    @abstractmethod
    def open(self, spans: Spans) -> LaunchPages:
        """Returns the pages of a launch, whose tokens must have pages."""

    @abstractmethod
    def copy_out(self, place: int, pages: Sequence[int]) -> tuple[Tensor, ...]:
        """Returns copies of pages of the group at a place, in the host's memory: `[pages, ...]` of each plane."""

    @abstractmethod
    def copy_in(self, place: int, pages: Sequence[int], copies: Sequence[Tensor]) -> None:
        """Writes copies from `copy_out` into pages."""

    @abstractmethod
    def wipe(self, place: int, pages: Sequence[int]) -> None:
        """Fills pages with zeros."""

    @abstractmethod
    def keep_prefix(self, depth: int, adapters: int, made: KeyValue) -> None:
        """Keeps the keys and values of a depth's prefix vectors.

        Args:
            depth: Which.
            adapters: Number of the adapters with which tokens that attend to them run the depth.
            made: Keys and values `[1, G, P, K]`.
        """

    def lost_shares(self) -> Mapping[int, str]:
        """Returns the shares whose pages are gone, and why."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Gives up all pages."""


class LocalKeeper(PageKeeper):
    """Pages in the memory of one device of this process.

    Args:
        layout: Heads of each depth.
        groups: Block tables.
        device: Of keys and values; the model may run on another one.
    """

    def __init__(self, layout: KeyLayout, groups: Sequence[PageGroup], device: torch.device):
        self.layout, self.groups, self.device = layout, list(groups), device
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for planes, num_pages in zip(layout.planes, layout.num_pages, strict=True):
            for depth, heads in planes.items():
                shape = (num_pages, heads, layout.page_size, layout.head_dim)
                self.keys[depth] = zeros(shape, layout.dtype, device)
                self.values[depth] = zeros(shape, layout.dtype, device)
        self.prefixes: dict[tuple[int, int], KeyValue] = {}

    @property
    def num_bytes(self) -> int:
        return self.layout.num_bytes

    def open(self, spans: Spans) -> "LocalPages":
        return LocalPages(self, spans)

    def planes(self, place: int) -> list[Tensor]:
        """Returns the keys, then the values, of all depths of a group."""
        depths = self.layout.planes[place]
        return [*(self.keys[depth] for depth in depths), *(self.values[depth] for depth in depths)]

    def copy_out(self, place: int, pages: Sequence[int]) -> tuple[Tensor, ...]:
        index = self._index(pages)
        return tuple(plane.index_select(0, index).cpu() for plane in self.planes(place))

    def copy_in(self, place: int, pages: Sequence[int], copies: Sequence[Tensor]) -> None:
        index = self._index(pages)
        for plane, copy in zip(self.planes(place), copies, strict=True):
            plane.index_copy_(0, index, copy.to(plane.device))

    def wipe(self, place: int, pages: Sequence[int]) -> None:
        index = self._index(pages)
        for plane in self.planes(place):
            plane.index_fill_(0, index, 0)

    def keep_prefix(self, depth: int, adapters: int, made: KeyValue) -> None:
        key, value = (each.to(self.device, self.layout.dtype) for each in made)
        self.prefixes[depth, adapters] = key, value

    def close(self) -> None:
        self.keys.clear()
        self.values.clear()
        self.prefixes.clear()

    def _index(self, pages: Sequence[int]) -> Tensor:
        return torch.tensor(pages, dtype=torch.long, device=self.device)


class LocalPages(LaunchPages):
    """The pages of one launch in a `LocalKeeper`.

    Args:
        keeper: Holds them.
        spans: Rows and positions.
    """

    def __init__(self, keeper: LocalKeeper, spans: Spans):
        self._keeper, self._spans = keeper, spans
        self._plans: dict[tuple[int, int, int], PagePlan] = {}
        self._ends = np.cumsum(spans.lengths) if spans.flat else np.arange(1, len(spans.rows) + 1)

    def append(self, parts: Sequence[StorePart], key: Tensor, value: Tensor) -> None:
        keeper = self._keeper
        key, value = (states.to(keeper.device) for states in (key, value))
        for depth, part, _ in parts:
            plan = self._plan(depth, part)
            for states, planes in ((key, keeper.keys), (value, keeper.values)):
                plane = planes[depth]
                heads, size = plane.shape[1], plane.shape[-1]
                rows = states[_behind(part, parts)].transpose(1, 2).reshape(-1, size)
                plane.view(-1, size).index_copy_(0, plan.places(heads), rows.to(plane.dtype))

    def attend(self, parts: Sequence[StorePart], query: Tensor) -> Tensor:
        rows, num_heads, tokens, size = query.shape
        groups = num_heads // self._keeper.layout.num_queries
        asked = query.reshape(rows, groups, -1, tokens, size).to(self._keeper.device)
        if len(parts) == 1:
            return self._attend(asked, parts[0]).to(query.device)
        found = [self._attend(asked[_behind(part.rows, parts)], part) for part in parts]
        return torch.cat(found).to(query.device)

    def _plan(self, depth: int, part: slice) -> PagePlan:
        """Returns where neighbouring rows of the launch read and write pages."""
        place = self._keeper.layout.groups[depth]
        key = place, part.start, part.stop
        if key not in self._plans:
            first, last = np.searchsorted(self._ends, (part.start, part.stop), side="right").tolist()
            assert last > first, "a depth must have spans"
            assert self._ends[last - 1] == part.stop, "a depth must have whole spans"
            rows, starts, lengths, flat = self._spans
            chosen = Spans(rows[first:last], starts[first:last], lengths[first:last], flat)
            self._plans[key] = plan_pages(self._keeper.groups[place], chosen, self._keeper.device)
        return self._plans[key]

    def _attend(self, query: Tensor, part: StorePart) -> Tensor:
        """Attends at one depth; queries `[rows, G, R, T, K]`."""
        keeper, layout = self._keeper, self._keeper.layout
        depth, rows, adapters = part
        sources, plan, prefix = layout.sources[depth], self._plan(depth, rows), keeper.prefixes.get((depth, adapters))
        found = []
        for source, heads in sources.reads:
            asked, own = query, prefix
            if heads is not None:
                asked = query[:, heads]
                own = None if prefix is None else (prefix[0][:, heads], prefix[1][:, heads])
            scoring = Scoring(layout.scaling, layout.softcap, own)
            keys, values = keeper.keys[source], keeper.values[source]
            mixed = [self._attend_run(asked, keys, values, run, scoring) for run in plan.runs]
            found.append(mixed[0] if len(mixed) == 1 else torch.cat(mixed))
        joined = found[0] if len(found) == 1 else torch.cat(found, dim=2)
        if sources.order is not None:
            joined = joined[:, :, sources.order]
        return joined.flatten(2, 3)

    def _attend_run(self, query: Tensor, keys: Tensor, values: Tensor, run: SpanRun, scoring: Scoring) -> Tensor:
        """Attends for one run; returns heads `[rows, T, G, R, K]`."""
        flat, spans, length = self._spans.flat, run.num_spans, run.length
        begin, num_rows = (run.begin, run.num_tokens) if flat else (run.begin // length, spans)
        if num_rows < len(query):
            query = query[begin : begin + num_rows]
        if flat and length > 1:
            query = query.view(spans, length, *query.shape[1:3], -1).permute(0, 2, 3, 1, 4)
        mixed = attend_run(query, keys, values, run, scoring)
        # For one token a span the order of axes is that of memory.
        heads = mixed.permute(0, 3, 1, 2, 4)
        return heads.flatten(0, 1).unsqueeze(1) if flat else heads


def _behind(part: slice, parts: Sequence[StorePart]) -> slice:
    """Returns the rows of a part, counted from the first row of the first part."""
    first = parts[0][1].start
    return slice(part.start - first, part.stop - first)
