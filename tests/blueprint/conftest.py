from collections.abc import Callable

import pytest

from refold.families.arch import ArchSpec
from refold.families.registry import read_arch


@pytest.fixture(scope="session")
def make_arch() -> Callable[..., ArchSpec]:
    """Makes a small architecture; any field of its config can be replaced."""

    def make(num_layers: int = 8, model_type: str = "llama", **config) -> ArchSpec:
        return read_arch(
            {
                "model_type": model_type,
                "vocab_size": 96,
                "hidden_size": 32,
                "intermediate_size": 80,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_hidden_layers": num_layers,
                **config,
            }
        )

    return make
