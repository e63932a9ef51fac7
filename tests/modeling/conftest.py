from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from refold.conversion.convert import ConvertOptions, convert
from refold.modeling.load import load_model


@pytest.fixture(scope="session")
def fold(make_source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Converts a tiny source; the same source and recipe are converted once."""
    made: dict[str, Path] = {}

    def make(variant: str = "llama", recipe: Mapping[str, Any] | None = None, **fields: Any) -> Path:
        key = repr((variant, recipe, sorted(fields.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("folded") / variant
            convert(make_source(variant, **fields), made[key], recipe, options=ConvertOptions(allow_larger=True))
        return made[key]

    return make


@pytest.fixture(scope="session")
def load(fold: Callable[..., Path]) -> Callable[..., Any]:
    """Loads the fold of a tiny source; `attn` names the attention back-end, None: the one transformers takes."""

    def make(
        variant: str = "llama", recipe: Mapping[str, Any] | None = None, attn: str | None = None, **fields: Any
    ) -> Any:
        return load_model(fold(variant, recipe, **fields), device="cpu", attn_implementation=attn)

    return make


@pytest.fixture(scope="session")
def load_source(make_source: Callable[..., Path]) -> Callable[..., PreTrainedModel]:
    """Loads a tiny source with transformers alone."""

    def make(variant: str = "llama", attn: str | None = None, dtype: str = "auto", **fields: Any) -> PreTrainedModel:
        folder = make_source(variant, **fields)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn).eval()

    return make


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """Two rows of 24 tokens, special ones left out."""
    return torch.randint(2, 95, (2, 24), generator=torch.Generator().manual_seed(7))
