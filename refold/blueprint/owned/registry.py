"""The list of all tensor kinds that belong to a depth, in the order of storage and of merging."""

from refold.blueprint.owned.coefficients import COEFFICIENTS
from refold.blueprint.owned.exits import EXIT
from refold.blueprint.owned.gain import GAIN
from refold.blueprint.owned.kind import OwnedKind
from refold.blueprint.owned.lora import LORA
from refold.blueprint.owned.merge import Merge, stored_weight
from refold.blueprint.owned.prefix import PREFIX
from refold.blueprint.owned.vectors import VECTORS
from refold.blueprint.schema import Blueprint, Pool

OWNED: tuple[OwnedKind, ...] = (VECTORS, GAIN, COEFFICIENTS, PREFIX, LORA, EXIT)
_DEFAULTS = (None, 0, {}, "tied")


def owned_kinds(blueprint: Blueprint) -> tuple[OwnedKind, ...]:
    """Returns the kinds that a blueprint has tensors of, in the order of `OWNED`."""
    holders = (*blueprint.mixers, *blueprint.mlps, *blueprint.depths)
    return tuple(
        kind for kind in OWNED if any(getattr(holder, kind.field, None) not in _DEFAULTS for holder in holders)
    )


def merge_at(blueprint: Blueprint, index: int, pool: Pool, local: str) -> Merge | None:
    """Returns the formula of one weight of a depth; None if the depth has dropped the part.

    Args:
        blueprint: The stack.
        index: The depth.
        pool: The pool of the part.
        local: The weight's name in the part, such as `q_proj.weight`.
    """
    part = getattr(blueprint.depths[index], pool)
    if part is None:
        return None
    merge = stored_weight(blueprint, pool, part, local)
    for kind in OWNED:
        merge = kind.merge(merge, blueprint, index, pool, local)
    return merge
