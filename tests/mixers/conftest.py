import pytest

from refold.families.arch import ArchSpec
from refold.families.registry import read_arch


@pytest.fixture(scope="session")
def arch() -> ArchSpec:
    """A small architecture with grouped key-value heads."""
    return read_arch(
        {
            "model_type": "llama",
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 4,
        }
    )
