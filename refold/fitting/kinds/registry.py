"""All kinds of choice about parts."""

from refold.fitting.kinds.drop import DroppedPart
from refold.fitting.kinds.kind import PartKind
from refold.fitting.kinds.mixer import OtherMixer
from refold.fitting.kinds.replace import ReplacedPart
from refold.fitting.kinds.share_kv import BorrowedKeys
from refold.fitting.kinds.whole import WholePart
from refold.fitting.kinds.width import NarrowerPart

PART_KINDS: tuple[PartKind, ...] = (
    WholePart(),
    NarrowerPart(),
    DroppedPart(),
    ReplacedPart(),
    OtherMixer(),
    BorrowedKeys(),
)
"""The whole part first: it is the first form of every part. `replace` stands behind `drop`, whose layers it reads."""


def find_kind(name: str) -> PartKind:
    """Returns the kind with a name."""
    return next(kind for kind in PART_KINDS if kind.name == name)
