"""The depths that read keys and values of others, by the recipe's `share_kv`, with all checks against the source."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from refold.blueprint.schema import KvRead
from refold.errors import RecipeError
from refold.families.arch import ArchSpec
from refold.planning.fold import FoldedStack
from refold.planning.mixers import ChosenMixer
from refold.recipe.share_kv import Back, ShareEntry, ShareRule

Reads = Mapping[int, tuple[KvRead, ...]]
"""The heads that each depth reads; depths that read nothing have no entry."""


@dataclass(frozen=True)
class _Stack:
    """The mixers of all depths.

    Attributes:
        mixers: For each depth its mixer; None: dropped.
        num_heads: Number of key-value heads.
    """

    mixers: Sequence[ChosenMixer | None]
    num_heads: int

    def makes_keys(self, depth: int) -> bool:
        mixer = self.mixers[depth]
        return mixer is not None and bool(mixer.mixer.key_value_names)


def choose_reads(
    share: ShareRule | tuple[ShareEntry, ...],
    arch: ArchSpec,
    mixers: Sequence[ChosenMixer | None],
    stack: FoldedStack,
) -> Reads:
    """Returns the key-value heads that each depth reads from earlier depths.

    A rule skips depths without softmax attention. In a list such a depth is an error.

    Args:
        share: The recipe's `share_kv`.
        arch: The source.
        mixers: For each depth its mixer; None: dropped.
        stack: The tied block.

    Raises:
        RecipeError: Nothing would be shared, a head or depth is out of range, a listed depth has no keys and values,
            two depths have different windows or rotary embeddings, or a head is read twice.
    """
    given = _Stack(mixers, arch.num_key_value_heads)
    if isinstance(share, ShareRule):
        heads = _heads(share.heads, given, "share_kv")
        pairs = [("share_kv.from", depth, earlier, heads) for depth, earlier in _by_rule(share, given, stack)]
        if not pairs:
            raise RecipeError(
                "share_kv.from: two depths with softmax attention, one of which reads from the other, are required "
                "(none are left); remove share_kv, or list depths"
            )
    else:
        pairs = [
            (f"share_kv[{index}]", entry.depth, entry.from_, _heads(entry.heads, given, f"share_kv[{index}]"))
            for index, entry in enumerate(share)
        ]
    reads: dict[int, tuple[KvRead, ...]] = {}
    for where, depth, earlier, heads in pairs:
        _require_fit(given, depth, earlier, where)
        known = {head for read in reads.get(depth, ()) for head in read.heads}
        twice = sorted(known & set(heads))
        if twice:
            raise RecipeError(f"{where}: depth {depth} reads head {twice[0]} already; name each head once")
        reads[depth] = (*reads.get(depth, ()), KvRead(depth=earlier, heads=heads))
    return {depth: tuple(sorted(found, key=lambda read: read.heads)) for depth, found in reads.items()}


def describe_reads(reads: Reads, num_heads: int) -> tuple[str, ...]:
    """Returns a note that lists the depths that read, and the depth that each reads from."""
    told = ", ".join(
        f"{depth} from {read.describe(num_heads)}" for depth, found in sorted(reads.items()) for read in found
    )
    return (f"share_kv: keys and values are read: depth {told}",)


def _heads(chosen: str | tuple[int, ...], given: _Stack, where: str) -> tuple[int, ...]:
    if isinstance(chosen, str):
        return tuple(range(given.num_heads))
    for head in chosen:
        if head >= given.num_heads:
            raise RecipeError(
                f"{where}.heads: head {head} is out of range ({given.num_heads} key-value heads: "
                f"0..{given.num_heads - 1})"
            )
    return tuple(sorted(chosen))


def _by_rule(share: ShareRule, given: _Stack, stack: FoldedStack) -> Iterator[tuple[int, int]]:
    making = [depth for depth in range(len(given.mixers)) if given.makes_keys(depth)]
    if isinstance(share.from_, Back):
        yield from ((depth, depth - share.from_.back) for depth in making if depth - share.from_.back in making)
    elif share.from_ == "pairs":
        yield from zip(making[1::2], making[::2], strict=False)
    else:
        if not stack.block or len(stack.block) == stack.num_stored:
            raise RecipeError(
                "share_kv.from: first_loop needs a block that runs two or more times (fold.loops above 1); use pairs, "
                "or list depths"
            )
        for group in stack.groups(making):
            yield from ((depth, group[0]) for depth in group[1:])


def _require_fit(given: _Stack, depth: int, earlier: int, where: str) -> None:
    num_depths = len(given.mixers)
    if depth >= num_depths:
        raise RecipeError(f"{where}: depth {depth} is out of range ({num_depths} depths: 0..{num_depths - 1})")
    if earlier >= depth:
        raise RecipeError(
            f"{where}: depth {depth} must read from an earlier one (got {earlier}); exchange the two, or name one above"
        )
    for each in (depth, earlier):
        mixer = given.mixers[each]
        if not given.makes_keys(each):
            got = "no attention" if mixer is None else mixer.mixer.type
            raise RecipeError(
                f"{where}: softmax attention is required at depths {earlier} and {depth} (depth {each} has {got}); "
                f"remove this entry"
            )
    one, other = given.mixers[depth], given.mixers[earlier]
    assert one is not None
    assert other is not None
    if one.window != other.window:
        raise RecipeError(
            f"{where}: one window is required (depth {depth} looks back {one.window or 'without end'}, depth {earlier} "
            f"{other.window or 'without end'}); share among depths with the same window"
        )
    if one.rope != other.rope:
        raise RecipeError(
            f"{where}: one rotary embedding is required (depths {depth} and {earlier} have different ones); share "
            f"among depths that have the same"
        )
