"""All mixer implementations, by the name of their spec."""

from collections.abc import Mapping

from refold.nn.mixers.attention import Attention
from refold.nn.mixers.mixer import Mixer

MIXERS: Mapping[str, type[Mixer]] = {"attention": Attention}
