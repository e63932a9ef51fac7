"""The tied block of a stack: its layers, the stored layer of each, and the tied layers that can be aligned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refold.blueprint.origins import Align
from refold.blueprint.schema import Blueprint, Pool
from refold.errors import RecipeError
from refold.recipe.fold import Fold
from refold.recipe.tying import TYING_INITS, TiedBlock, TyingInit, evenly_spaced, explicit

# For each pattern: the stored layer at place `place` of a block of `num_stored` stored layers that runs `loops` times.
PATTERNS: dict[str, Callable[[int, int, int], int]] = {
    "cycle": lambda place, num_stored, loops: place % num_stored,
    "sequence": lambda place, num_stored, loops: place // loops,
    "cycle_reversed": lambda place, num_stored, loops: (
        num_stored - 1 - place % num_stored if place // num_stored % 2 else place % num_stored
    ),
}


@dataclass(frozen=True)
class FoldedStack:
    """The source layers in the tied block, and the stored layer that each of them runs.

    Attributes:
        block: Source layers of the block, in their order; all other layers are untied.
        stored: For each layer of the block the index of its stored layer, in the order of the first loop.
        num_stored: Number of stored layers of the block.
        dropped: Source layers that are dropped because `loops` does not divide the block.
        notes: Notes for the plan.
    """

    block: tuple[int, ...]
    stored: tuple[int, ...]
    num_stored: int
    dropped: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def loop_ends(self) -> tuple[int, ...]:
        """Returns the last source layer of each loop."""
        return self.block[self.num_stored - 1 :: self.num_stored]

    def groups(self, users: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Returns for each stored layer the source layers in `users` that are tied to it."""
        return tuple(
            tuple(
                layer
                for layer, stored in zip(self.block, self.stored, strict=True)
                if stored == index and layer in users
            )
            for index in range(self.num_stored)
        )


UNTIED = FoldedStack((), (), 0)
"""A stack in which no layers are tied."""


def fold_layers(fold: Fold, layers: Sequence[int]) -> FoldedStack:
    """Divides layers into prelude, block and coda.

    Args:
        fold: The recipe's `fold`, with `loops`.
        layers: Source layers that are not dropped, in their order.

    Raises:
        RecipeError: The block is smaller than `loops`, or `loops` does not divide it and `uneven` is `error`.
    """
    assert fold.loops is not None
    size = len(layers) - fold.prelude - fold.coda
    surplus = size % fold.loops
    if size < fold.loops:
        raise RecipeError(
            f"fold.loops: a block of at least {fold.loops} layers is required (got {max(size, 0)}: {len(layers)} "
            f"layers, prelude {fold.prelude}, coda {fold.coda}); lower loops, prelude or coda"
        )
    if surplus and fold.uneven == "error":
        raise RecipeError(
            f"fold.loops: must divide the layers of the block (got {size} layers and {fold.loops} loops, {surplus} too "
            f"many); set fold.uneven to drop or prelude, or change fold.prelude and fold.coda"
        )
    prelude = fold.prelude + (surplus if fold.uneven == "prelude" else 0)
    block = tuple(layers[prelude : len(layers) - fold.coda])
    dropped: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    if surplus and fold.uneven == "prelude":
        notes = (f"fold.uneven: {fold.loops} loops leave {surplus} of {size} layers over: prelude is {prelude} layers",)
    if surplus and fold.uneven == "drop":
        kept = tuple(block[index] for index in evenly_spaced(size, size - surplus))
        dropped, block = tuple(layer for layer in block if layer not in kept), kept
        notes = (f"fold.uneven: {fold.loops} loops leave {surplus} of {size} layers over: dropped {list(dropped)}",)
    num_stored = len(block) // fold.loops
    pattern = PATTERNS[fold.pattern]
    stored = tuple(pattern(place, num_stored, fold.loops) for place in range(len(block)))
    return FoldedStack(block, stored, num_stored, frozenset(dropped), notes)


def listed_ties(fold: Fold, pool: Pool, kept: Sequence[int], num_layers: int, is_final: bool) -> FoldedStack:
    """Returns the listed ties of one pool.

    Args:
        fold: The recipe's `fold`, with `groups`.
        pool: The pool.
        kept: Source layers that run their mixer (or MLP).
        num_layers: Number of source layers.
        is_final: Whether it is decided which parts are dropped; otherwise a tied part may be among them.

    Raises:
        RecipeError: A layer is out of range, or its part is dropped.
    """
    assert fold.groups is not None
    groups: list[tuple[int, ...]] = []
    for index, group in enumerate(fold.groups):
        if pool not in group.tie:
            continue
        for layer in group.layers:
            where = f"fold.groups[{index}].layers: layer {layer}"
            if layer >= num_layers:
                raise RecipeError(f"{where} is out of range ({num_layers} source layers: 0..{num_layers - 1})")
            if is_final and layer not in kept:
                raise RecipeError(f"{where} must keep its {pool} (got one that is dropped); remove the layer")
        groups.append(group.layers)
    groups.sort()
    places = sorted((layer, stored) for stored, layers in enumerate(groups) for layer in layers if layer in kept)
    return FoldedStack(tuple(layer for layer, _ in places), tuple(stored for _, stored in places), len(groups))


def tied_sources(fold: Fold, stack: FoldedStack, users: Sequence[int], num_layers: int) -> tuple[tuple[int, ...], ...]:
    """Returns for each stored layer of the block the source layers that it is computed from, in one pool.

    A stored layer with a single user is not tied: it is computed from that layer, unless `init` is a list or `random`.

    Args:
        fold: The recipe's `fold`, with `init` resolved.
        stack: The result of `fold_layers` or `listed_ties`.
        users: Source layers that run their mixer (or MLP).
        num_layers: Number of source layers.

    Raises:
        RecipeError: A list in `init` has a wrong length, or a layer that is out of range.
    """
    groups = stack.groups(users)
    init = _find_init(fold, stack.num_stored, num_layers)
    blocks = [TiedBlock(stack.block, groups)]
    if fold.groups is not None:
        # Each listed group is a block with one stored layer.
        blocks = [TiedBlock(group, (group,)) for group in groups if group]
    sources = tuple(made for block in blocks for made in init.sources(block))
    if len(sources) < len(groups):
        found = iter(sources)
        sources = tuple(next(found) if group else () for group in groups)
    if init.name in ("explicit", "random"):
        return sources
    return tuple(group if len(group) == 1 else made for group, made in zip(groups, sources, strict=True))


def _find_init(fold: Fold, num_stored: int, num_layers: int) -> TyingInit:
    assert fold.init is not None
    if isinstance(fold.init, str):
        return TYING_INITS[fold.init]
    if len(fold.init) != num_stored:
        raise RecipeError(
            f"fold.init: one source layer for each of the {num_stored} stored layers is required (got {len(fold.init)})"
        )
    for layer in fold.init:
        if layer >= num_layers:
            raise RecipeError(
                f"fold.init: layer {layer} is out of range ({num_layers} source layers: 0..{num_layers - 1})"
            )
    return explicit(fold.init)


def aligned_groups(blueprint: Blueprint, pool: Pool) -> tuple[tuple[int, ...], ...]:
    """Returns for each tied part that can be aligned the source layers of its depths, in their order.

    Parts that cannot be aligned: other mixers than attention, and attention that shares keys and values between depths.
    """
    return tuple(layers for layers, reason in _tied(blueprint, pool) if not reason)


def describe_alignment(blueprint: Blueprint, align: Align) -> tuple[str, ...]:
    """Returns notes about the layers that are aligned, and the tied layers that are not."""
    if align == "none":
        return ()
    said = []
    pools: tuple[tuple[Pool, str], ...] = (("mixer", "attention"), ("mlp", "MLPs"))
    for pool, name in pools[: 1 if align == "rotation" else None]:
        groups = aligned_groups(blueprint, pool)
        if groups:
            listed = ", ".join(str(list(layers)) for layers in groups)
            said.append(f"fold.align: {align}: {name} of layers {listed} aligned to the first layer of each group")
        for layers, reason in _tied(blueprint, pool):
            if reason:
                said.append(f"fold.align: {name} of layers {list(layers)} not aligned: {reason}")
    return tuple(said)


def _tied(blueprint: Blueprint, pool: Pool) -> list[tuple[tuple[int, ...], str]]:
    """Returns the source layers of each tied part, and the reason why they cannot be aligned (empty: they can)."""
    found = []
    for part in range(len(blueprint.pool(pool))):
        users = blueprint.users(pool, part)
        if len(users) < 2 or not blueprint.pool(pool)[part].sources:
            continue
        reason = ""
        if pool == "mixer" and not blueprint.mixers[part].mixer.is_native:
            reason = f"they become {blueprint.mixers[part].mixer.type}"
        elif pool == "mixer" and any(blueprint.depths[user].kv or blueprint.is_read(user) for user in users):
            reason = "keys and values are shared between depths"
        found.append((tuple(blueprint.depths[user].source for user in users), reason))
    return found
