"""All initialisations, by their name in a plan."""

from collections.abc import Callable, Mapping
from typing import Literal

from refold.calibration.svd import SvdMode
from refold.conversion.starts.basis import fit_basis
from refold.conversion.starts.group import Fitted, FittedBasis, LinearGroup
from refold.conversion.starts.joint import fit_joint
from refold.conversion.starts.svd import fit_svd
from refold.conversion.starts.zero import fit_zero

STARTS: Mapping[str, Callable[[LinearGroup, SvdMode], Fitted]] = {
    "zero": fit_zero,
    "svd": fit_svd,
    "joint": fit_joint,
}


def fit(group: LinearGroup, init: Literal["svd", "zero", "joint"], svd: SvdMode) -> Fitted | FittedBasis:
    """Computes the stored weight and the LoRA pairs of one linear with the initialisation `init`."""
    return STARTS[init](group, svd) if group.basis_rank is None else fit_basis(group, init, svd)
