"""Small models that are evaluated."""

from pathlib import Path

import pytest

from refold.conversion.convert import convert


@pytest.fixture(scope="session")
def source(make_model) -> Path:
    return make_model()


@pytest.fixture(scope="session")
def folded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folded") / "out"
    convert(source, folder, {"fold": {"loops": 2}, "relax": {"type": "lora", "rank": 5}, "exits": {"at": "loops"}})
    return folder
