"""All starts, by the name a plan gives them."""

from collections.abc import Callable, Mapping

from refold.convert.starts.group import Fitted, LinearGroup
from refold.convert.starts.joint import fit_joint
from refold.convert.starts.svd import fit_svd
from refold.convert.starts.zero import fit_zero
from refold.convert.svd import SvdMode

STARTS: Mapping[str, Callable[[LinearGroup, SvdMode], Fitted]] = {
    "zero": fit_zero,
    "svd": fit_svd,
    "joint": fit_joint,
}
