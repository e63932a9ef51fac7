"""The folder a benchmark makes its checkpoints in."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """Yields the folder, which stays for the next run; None: a temporary one."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="refold-benchmark-") as made:
        yield Path(made)
