"""Which tied layers are brought into a common frame before they are tied."""

from refold.blueprint.schema import Blueprint, Pool
from refold.blueprint.starts import Align


def aligned_groups(blueprint: Blueprint, pool: Pool) -> tuple[tuple[int, ...], ...]:
    """Returns for each tied part that can be aligned the source layers of its depths, top to bottom.

    Attention that was exchanged for another mixer, or whose keys and values another depth reads or makes, cannot.
    """
    return tuple(layers for layers, reason in _tied(blueprint, pool) if not reason)


def describe_alignment(blueprint: Blueprint, align: Align) -> tuple[str, ...]:
    """Returns lines on what is aligned, and what is not."""
    if align == "none":
        return ()
    said = []
    pools: tuple[tuple[Pool, str], ...] = (("mixer", "attention"), ("mlp", "MLPs"))
    for pool, name in pools[: 1 if align == "rotation" else None]:
        groups = aligned_groups(blueprint, pool)
        if groups:
            listed = ", ".join(str(list(layers)) for layers in groups)
            said.append(f"fold.align: {align}: {name} of layers {listed} in the frame of the first of each")
        for layers, reason in _tied(blueprint, pool):
            if reason:
                said.append(f"fold.align: {name} of layers {list(layers)} not aligned: {reason}")
    return tuple(said)


def _tied(blueprint: Blueprint, pool: Pool) -> list[tuple[tuple[int, ...], str]]:
    """Source layers of each tied part that has some, and why they cannot be aligned; empty: they can."""
    found = []
    for part in range(len(blueprint.pool(pool))):
        users = blueprint.users(pool, part)
        if len(users) < 2 or not blueprint.pool(pool)[part].sources:
            continue
        reason = ""
        if pool == "mixer" and blueprint.mixers[part].type != "attention":
            reason = f"they become {blueprint.mixers[part].type}"
        elif pool == "mixer" and any(blueprint.depths[user].kv or blueprint.is_read(user) for user in users):
            reason = "keys and values are shared between depths"
        found.append((tuple(blueprint.depths[user].source for user in users), reason))
    return found
