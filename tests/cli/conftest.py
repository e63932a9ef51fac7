"""The model that ships with refold."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shipped() -> Path:
    from refold.studies.shipped import shipped_model

    return shipped_model()
