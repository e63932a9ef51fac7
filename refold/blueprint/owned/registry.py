"""All kinds of tensors that a depth owns, in the order they are stored and merged."""

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


def merge_at(blueprint: Blueprint, index: int, pool: Pool, local: str) -> Merge | None:
    """Returns the names of the tensors that one weight of a depth is computed from; None where its part is dropped.

    Args:
        blueprint: The stack.
        index: The depth.
        pool: Of the part.
        local: The tensor's name in the part, such as `q_proj.weight`.
    """
    part = getattr(blueprint.depths[index], pool)
    if part is None:
        return None
    merge = stored_weight(blueprint, pool, part, local)
    for kind in OWNED:
        merge = kind.merge(merge, blueprint, index, pool, local)
    return merge
