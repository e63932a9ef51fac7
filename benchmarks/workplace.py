"""The folder for the checkpoints of a benchmark."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """Yields the given folder, which is kept for the next run, or a temporary folder for None."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="refold-benchmark-") as made:
        yield Path(made)
