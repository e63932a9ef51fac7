"""Short names of models that tell them apart."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def short_names(paths: Sequence[str]) -> list[str]:
    """Returns a name for each path or hub id: as many of its last parts, joined by `-`, as tell all of them apart.

    Equal paths get equal names.
    """
    parts = [Path(path).parts if Path(path).name else Path(path).resolve().parts for path in paths]
    cleaned = [[part.strip("/\\:") for part in each] for each in parts]
    names: list[str] = []
    for depth in range(1, max(map(len, cleaned), default=0) + 1):
        names = ["-".join(filter(None, each[-depth:])) for each in cleaned]
        if len(set(names)) == len(set(paths)):
            break
    return names


def numbered_names(names: Sequence[str]) -> list[str]:
    """Returns names with a number behind each that was there before: `a`, `a (2)`."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found
