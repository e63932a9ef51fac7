"""All starts, by the name a plan gives them."""

from collections.abc import Callable, Mapping

from refold.conversion.starts.group import Fitted, LinearGroup
from refold.conversion.starts.joint import fit_joint
from refold.conversion.starts.svd import fit_svd
from refold.conversion.starts.zero import fit_zero
from refold.measuring.svd import SvdMode

STARTS: Mapping[str, Callable[[LinearGroup, SvdMode], Fitted]] = {
    "zero": fit_zero,
    "svd": fit_svd,
    "joint": fit_joint,
}
