"""All kinds of choice about parts."""

from refold.fitting.kinds.kind import PartKind

PART_KINDS: tuple[PartKind, ...] = ()


def find_kind(name: str) -> PartKind:
    """Returns the kind with a name."""
    return next(kind for kind in PART_KINDS if kind.name == name)
