"""All export targets by their name, the value of `--to`."""

from collections.abc import Mapping

from refold.errors import ExportError
from refold.exporting import dense
from refold.exporting.target import ExportTarget
from refold.suggest import must_be_one_of

TARGETS: Mapping[str, ExportTarget] = {target.name: target for target in (dense.TARGET,)}


def find_target(name: str) -> ExportTarget:
    """Returns an export target.

    Raises:
        ExportError: There is no target of that name.
    """
    if name not in TARGETS:
        raise ExportError(f"export: to: {must_be_one_of(name, TARGETS)}")
    return TARGETS[name]
