"""The layout of keys and values: sizes of pages, and the heads that each depth keeps and attends to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from refold.blueprint.part_sizes import head_counts
from refold.blueprint.schema import Blueprint
from refold.engine.pages import PoolSettings, paged_depths
from refold.errors import RefoldError
from refold.nn.mixers.key_values import KeyHeads

VERSION = 2
"""Of the form that `to_json` writes, and of the messages to attention workers."""


@dataclass(frozen=True)
class HeadSources:
    """The planes that one depth attends to.

    Attributes:
        reads: Depth of each plane, and the key-value heads the plane holds; None: all of the layout's.
        order: Place of each key-value head among the heads of all planes; None: in order.
    """

    reads: tuple[tuple[int, tuple[int, ...] | None], ...]
    order: tuple[int, ...] | None


@dataclass(frozen=True)
class KeyLayout:
    """All that a keeper of pages must know of a stack, or of some of its key-value heads.

    Attributes:
        page_size: Tokens of a page.
        max_rows: The largest number of rows.
        head_dim: Size of a key.
        num_queries: Query heads of each key-value head.
        scaling: Factor of the scores.
        softcap: Bound of the scores, approached by a tanh; None: none.
        dtype: Of keys and values.
        windows: Window of each group of pages; None: the whole context.
        num_pages: Pages of each group.
        planes: For each group the depths that keep keys, and the number of heads that each keeps.
        groups: Place of the group of each depth that attends.
        sources: The planes that it attends to.
    """

    page_size: int
    max_rows: int
    head_dim: int
    num_queries: int
    scaling: float
    softcap: float | None
    dtype: torch.dtype
    windows: tuple[int | None, ...]
    num_pages: tuple[int, ...]
    planes: tuple[Mapping[int, int], ...]
    groups: Mapping[int, int]
    sources: Mapping[int, HeadSources]

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        page = 2 * self.page_size * self.head_dim * self.dtype.itemsize
        return sum(
            page * pages * sum(planes.values()) for pages, planes in zip(self.num_pages, self.planes, strict=True)
        )

    def to_json(self) -> str:
        """Returns the layout as JSON."""
        told = {name: getattr(self, name) for name in _PLAIN}
        return json.dumps(
            {
                **told,
                "version": VERSION,
                "dtype": str(self.dtype).removeprefix("torch."),
                "planes": [sorted(planes.items()) for planes in self.planes],
                "groups": sorted(self.groups.items()),
                "sources": [[depth, each.reads, each.order] for depth, each in sorted(self.sources.items())],
            }
        )

    @classmethod
    def from_json(cls, text: bytes) -> "KeyLayout":
        """Reads a layout.

        Raises:
            RefoldError: The text is no layout, or another version wrote it.
        """
        try:
            told = json.loads(text)
            if told["version"] != VERSION:
                raise RefoldError(
                    f"layout: version {VERSION} is required (got {told['version']}); run the same refold on all hosts"
                )
            return cls(
                **{name: told[name] for name in _NUMBERS},
                windows=tuple(told["windows"]),
                num_pages=tuple(told["num_pages"]),
                dtype=_DTYPES[told["dtype"]],
                planes=tuple({int(depth): int(heads) for depth, heads in planes} for planes in told["planes"]),
                groups={int(depth): int(place) for depth, place in told["groups"]},
                sources={int(depth): _read_sources(reads, order) for depth, reads, order in told["sources"]},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RefoldError(f"layout: a key layout as JSON is required (got {text[:80]!r}: {error})") from error


_NUMBERS = ("page_size", "max_rows", "head_dim", "num_queries", "scaling", "softcap")
_PLAIN = (*_NUMBERS, "windows", "num_pages")
_DTYPES = {str(each).removeprefix("torch."): each for each in (torch.float32, torch.bfloat16, torch.float16)}


def make_layout(
    blueprint: Blueprint, settings: PoolSettings, heads: range | None = None, num_shares: int = 1
) -> KeyLayout:
    """Returns the layout of some key-value heads of a stack.

    Args:
        blueprint: The stack.
        settings: Sizes of the pools.
        heads: Neighbouring key-value heads; None: all.
        num_shares: Number of equal shares of the pages, of which the layout has one.
    """
    arch = blueprint.arch
    heads = range(max(head_counts(blueprint), default=0)) if heads is None else heads
    paged = paged_depths(blueprint)
    places = {window: place for place, window in enumerate(paged)}
    attending = {
        index: places[each.window]
        for index, each in enumerate(blueprint.depths)
        if each.mixer is not None and not blueprint.keeps_state(index)
    }
    kept = [{depth: len(_among(blueprint.made_heads(depth), heads)) for depth in depths} for depths in paged.values()]
    return KeyLayout(
        page_size=settings.page_size,
        max_rows=settings.max_rows,
        head_dim=arch.head_dim,
        num_queries=arch.num_attention_heads // arch.num_key_value_heads,
        scaling=arch.attention_scale,
        softcap=arch.attention_softcap,
        dtype=settings.dtype,
        windows=tuple(paged),
        num_pages=tuple(settings.pages_of(window) // num_shares for window in paged),
        planes=tuple({depth: count for depth, count in depths.items() if count} for depths in kept),
        groups=attending,
        sources={index: _find_sources(blueprint, index, heads) for index in attending},
    )


def made_slice(blueprint: Blueprint, index: int, heads: range) -> slice:
    """Returns the places of some neighbouring heads among those that a depth makes."""
    made = blueprint.made_heads(index)
    begin = sum(head < heads.start for head in made)
    return slice(begin, begin + len(_among(made, heads)))


def _find_sources(blueprint: Blueprint, index: int, heads: range) -> HeadSources:
    """Returns the planes of some heads of a depth; heads are counted from the first of them."""
    found = KeyHeads(blueprint, index)
    heads = range(heads.start, min(heads.stop, len(found.picks)))
    depths = (index, *found.sources)
    picks = [(place, blueprint.made_heads(depths[place])[at]) for place, at in found.picks[heads.start : heads.stop]]
    kept = {
        place: _among(blueprint.made_heads(depths[place]), heads) for place in sorted({place for place, _ in picks})
    }
    begins, total = {}, 0
    for place, own in kept.items():
        begins[place], total = total, total + len(own)
    order = tuple(begins[place] + kept[place].index(head) for place, head in picks)
    in_order = len(kept) == 1 and order == tuple(range(len(heads)))
    reads = (
        (depths[place], None if len(own) == len(heads) else tuple(head - heads.start for head in own))
        for place, own in kept.items()
    )
    return HeadSources(tuple(reads), None if in_order else order)


def _among(made: tuple[int, ...], heads: range) -> list[int]:
    return [head for head in made if head in heads]


def _read_sources(reads: Any, order: Any) -> HeadSources:
    found = tuple((int(depth), None if own is None else tuple(own)) for depth, own in reads)
    return HeadSources(found, None if order is None else tuple(order))
