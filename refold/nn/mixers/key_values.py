"""Keys and values that pass from depth to depth in one forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refold.blueprint.schema import Blueprint

KeyValue = tuple[Tensor, Tensor]
"""Keys and values `[B, heads, S, K]` of the S tokens that are attended to, those of the cache included."""


class KeyHeads:
    """The key-value heads that a depth makes, and the source of each head that it attends to.

    Args:
        blueprint: The stack.
        index: Which depth.

    Attributes:
        made: Heads that it makes and caches, out of all heads that its weights could make.
        makes_all: Whether it makes every head.
        sources: Earlier depths it reads from.
        is_read: Whether later depths read from it.
        picks: For each head in order the place it comes from (0: made here, i: source i - 1), and its index among the
            heads made there.
    """

    def __init__(self, blueprint: Blueprint, index: int):
        reads = blueprint.depths[index].kv
        num_heads = blueprint.part_arch("mixer", blueprint.depths[index].mixer).num_key_value_heads
        self.made = blueprint.made_heads(index)
        self.makes_all = len(self.made) == num_heads
        self.sources = tuple(dict.fromkeys(read.depth for read in reads))
        self.is_read = blueprint.is_read(index)
        # Place 0 holds the heads that this depth makes, each further place the heads that one source makes.
        places = [self.made, *(blueprint.made_heads(source) for source in self.sources)]
        place_of = dict.fromkeys(range(num_heads), 0)
        place_of |= {head: 1 + self.sources.index(read.depth) for read in reads for head in read.heads}
        self.picks = [(place, places[place].index(head)) for head, place in sorted(place_of.items())]
        used = set(place_of.values())
        is_whole = len(used) == 1 and len(places[min(used)]) == num_heads
        self._whole = min(used) if is_whole else None

    def look_at(self, made: KeyValue | None, read: Sequence[KeyValue]) -> KeyValue:
        """Returns keys and values of all heads, in order.

        Args:
            made: Of the heads this depth makes; None: it makes none.
            read: Of the heads each of its sources makes.
        """
        places = (made, *read)
        if self._whole is not None:
            found = places[self._whole]
            assert found is not None
            return found
        picked = [_head(places[place], at) for place, at in self.picks]
        return torch.cat([key for key, _ in picked], dim=1), torch.cat([value for _, value in picked], dim=1)


def _head(pair: KeyValue | None, at: int) -> KeyValue:
    assert pair is not None
    return pair[0][:, at : at + 1], pair[1][:, at : at + 1]
