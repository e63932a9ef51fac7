import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from refold.checkpoint.gguf.rope_factors import find_llama3_scaling

PUBLISHED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def factors_of(theta: float, head_dim: int, scaling: dict[str, Any]) -> list[float]:
    """Factors by transformers' own frequencies."""
    rope = {"rope_type": "llama3", "rope_theta": theta, **scaling}
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        rope_parameters=rope,
        max_position_embeddings=2**17,
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    return (plain / scaled.double()).float().tolist()


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_numbers_of_published_models_are_found(factor: float, head_dim: int) -> None:
    wanted = {**PUBLISHED, "factor": factor}
    assert find_llama3_scaling(factors_of(500000.0, head_dim, wanted), 500000.0) == {"rope_type": "llama3", **wanted}


@settings(max_examples=60)
@given(
    theta=st.sampled_from([50.0, 1e4, 5e5, 1e7]),
    head_dim=st.sampled_from([8, 16, 64, 128]),
    factor=st.floats(1.5, 64.0),
    low=st.sampled_from([1.0, 2.0]),
    ratio=st.sampled_from([2.0, 4.0, 8.0]),
    context=st.integers(32, 65536),
)
def test_numbers_that_give_the_same_factors_are_found(
    theta: float, head_dim: int, factor: float, low: float, ratio: float, context: int
) -> None:
    scaling = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low * ratio,
        "original_max_position_embeddings": context,
    }
    factors = factors_of(theta, head_dim, scaling)
    found = find_llama3_scaling(factors, theta)
    if found is None:
        # Few pairs do not always determine other bounds than the published ones, nor the factor where no pair is
        # scaled by the whole of it; the file is then refused by name.
        assert (low, ratio) != (1.0, 4.0) or max(factors) < factor * (1 - 1e-4)
        return
    if not found:
        assert max(factors) < 1.001
        return
    again = factors_of(theta, head_dim, {name: value for name, value in found.items() if name != "rope_type"})
    assert again == pytest.approx(factors, rel=3e-4)


def test_factors_of_one_scale_nothing() -> None:
    assert find_llama3_scaling([1.0] * 8, 1e4) == {}


@pytest.mark.parametrize(
    "factors", [[4.0, 1.0, 2.0, 1.0], [1.0, 0.5], [1.0, math.nan], [math.inf, 1.0], [1.0, 1.5, 1.2, 9.0]]
)
def test_other_factors_are_refused(factors: list[float]) -> None:
    assert find_llama3_scaling(factors, 1e4) is None
