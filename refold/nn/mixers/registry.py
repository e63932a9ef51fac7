"""All mixer implementations, by the name of their spec."""

from collections.abc import Mapping

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
