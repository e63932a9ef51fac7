"""Merge paths of byte-pair encoding: the tokens that a text passes through on its way to a token."""

from collections.abc import Iterable, Mapping

MergePair = tuple[str, str]


class MergePaths:
    """Finds the merge paths of tokens under a list of merges.

    BPE merges the pair of the lowest rank first (Sennrich et al., arXiv 1508.07909). The merges inside the span of a
    final token happen in the same order as if the token stood alone, because a pair across its border, merged earlier,
    would have made another token. So the merge path of the token alone is its path in every text.

    Args:
        merges: Pairs, best first.
    """

    def __init__(self, merges: Iterable[MergePair]):
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}

    def path(self, token: str) -> frozenset[str]:
        """Returns all tokens on the way from single characters to a token, both ends included.

        A token that its characters do not merge to has no path: the result is then empty.
        """
        parts = list(token)
        seen = set(parts)
        while len(parts) > 1:
            places = range(len(parts) - 1)
            rank, place = min((self._ranks.get((parts[i], parts[i + 1]), _NEVER), i) for i in places)
            if rank == _NEVER:
                return frozenset()
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            seen.add(parts[place])
        return frozenset(seen)


_NEVER = 1 << 62


def read_merges(model: Mapping[str, object]) -> list[MergePair]:
    """Returns the merges of a BPE model in `tokenizer.json`, which are pairs or, in older files, `left right`."""
    merges = model["merges"]
    assert isinstance(merges, list)
    return [_split(merge) if isinstance(merge, str) else (merge[0], merge[1]) for merge in merges]


def _split(merge: str) -> MergePair:
    left, _, right = merge.partition(" ")
    return left, right
