"""Calibration text of the tests of conversion."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, sentences: tuple[str, ...]) -> Path:
    """A file of short texts."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(sentences * 20))
    return path
