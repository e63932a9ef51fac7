"""Folded models that several tests export; a folder made once is given again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Fold = Callable[..., Path]


@pytest.fixture(scope="session")
def fold(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Fold:
    """Folds the source of a variant by a recipe, or returns the source where the recipe is None."""
    from refold.conversion.convert import ConvertOptions, convert

    made: dict[str, Path] = {}

    def make(variant: str, recipe: dict[str, Any] | None, **fields: Any) -> Path:
        key = repr((variant, recipe, fields))
        if key not in made:
            made[key] = make_model(variant, **fields)
            if recipe is not None:
                folder = tmp_path_factory.mktemp("folded") / variant
                convert(made[key], folder, recipe, options=ConvertOptions(allow_larger=True))
                made[key] = folder
        return made[key]

    return make
