"""The module of every mixer, by the `type` of its typed object."""

from collections.abc import Mapping

from refold.errors import RecipeError
from refold.mixers.registry import MIXERS as SPECS
from refold.nn.mixers.attention import AttentionMixer
from refold.nn.mixers.gated_deltanet import GatedDeltanetMixer
from refold.nn.mixers.gla import GlaMixer
from refold.nn.mixers.linear_attention import LinearAttentionMixer
from refold.nn.mixers.mamba import MambaMixer
from refold.nn.mixers.mamba2 import Mamba2Mixer
from refold.nn.mixers.mixer import Mixer
from refold.nn.mixers.retention import RetentionMixer

MIXERS: Mapping[str, type[Mixer]] = {
    "attention": AttentionMixer,
    "retention": RetentionMixer,
    "mamba": MambaMixer,
    "mamba2": Mamba2Mixer,
    "gla": GlaMixer,
    "gated_deltanet": GatedDeltanetMixer,
    "linear_attention": LinearAttentionMixer,
}

for _name in SPECS.keys() ^ MIXERS.keys():
    _here, _there = "refold/mixers/registry.py", "refold/nn/mixers/registry.py"
    _given, _lacking = (_here, _there) if _name in SPECS else (_there, _here)
    raise RecipeError(f"mixers: {_name}: an entry in {_lacking} is required (there is only one in {_given})")
