"""All claims by name."""

from collections.abc import Mapping, Sequence

from refold.claims.claim import Claim
from refold.claims.papers import (
    beyond,
    drop,
    rrt_exits,
    rrt_healing,
    rrt_relaxation,
    rrt_starts,
    serving,
    skip_attention,
    xatl,
)
from refold.errors import RefoldError
from refold.suggest import must_be_one_of

GROUPS = (rrt_starts, rrt_relaxation, rrt_healing, rrt_exits, serving, xatl, drop, skip_attention, beyond)
CLAIMS: Mapping[str, Claim] = {claim.name: claim for group in GROUPS for claim in group.CLAIMS}


def choose_claims(names: Sequence[str] | None) -> tuple[Claim, ...]:
    """Returns claims by name, in the order of the registry; None: all.

    Raises:
        RefoldError: A claim is unknown.
    """
    for name in names or ():
        if name not in CLAIMS:
            raise RefoldError(f"only: {must_be_one_of(name, CLAIMS)}")
    return tuple(claim for name, claim in CLAIMS.items() if not names or name in names)
