import pytest
import torch

from refold.exporting.gguf.rotary_fields import llama3_factors, rotary_fields, rotary_obstacles
from refold.families.arch import Rope
from refold.nn.rotary import inverse_frequencies

LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


def test_llama3_factors_divide_frequencies_as_transformers_does():
    rope = Rope(kind="llama3", theta=50.0, rotary_dim=16, scaling=LLAMA3)
    plain, _ = inverse_frequencies(Rope(theta=50.0, rotary_dim=16), 256)
    scaled, _ = inverse_frequencies(rope, 256)
    torch.testing.assert_close(plain / torch.tensor(llama3_factors(rope)), scaled)
    (tensor,) = rotary_fields(rope).tensors
    assert (tensor.name, tensor.shape) == ("rope_freqs.weight", (8,))


def test_keys_of_yarn_are_written_only_where_they_differ():
    keys = rotary_fields(Rope(kind="yarn", rotary_dim=8, scaling=YARN)).fields
    assert keys["{arch}.rope.scaling.type"] == "yarn"
    assert keys["{arch}.rope.scaling.original_context_length"] == 16
    assert not any("attn_factor" in key or "beta" in key for key in keys)
    scaling = {**YARN, "attention_factor": 1.5, "beta_fast": 16}
    keys = rotary_fields(Rope(kind="yarn", rotary_dim=8, scaling=scaling)).fields
    assert keys["{arch}.rope.scaling.attn_factor"] == pytest.approx(1.5 / 1.1386294)
    assert keys["{arch}.rope.scaling.yarn_beta_fast"] == 16.0


def test_scaling_that_an_architecture_lacks_is_named():
    assert rotary_obstacles(Rope(kind="llama3", rotary_dim=8, scaling=LLAMA3), True) == []
    assert "llama3" in rotary_obstacles(Rope(kind="llama3", rotary_dim=8, scaling=LLAMA3), False)[0].required
    uncut = Rope(kind="yarn", rotary_dim=8, scaling={**YARN, "truncate": False})
    assert "truncate: true" in rotary_obstacles(uncut, True)[0].required


def test_dynamic_scaling_is_noted():
    found = rotary_fields(Rope(kind="dynamic", rotary_dim=8, scaling={"factor": 4.0}))
    assert "behind the context length" in found.notes[0]
    assert not any("scaling" in key for key in found.fields)
