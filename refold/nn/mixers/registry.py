"""All mixer implementations, by the name of their spec."""

from collections.abc import Mapping

from refold.nn.mixers.attention import Attention
from refold.nn.mixers.gated_deltanet import GatedDeltanet
from refold.nn.mixers.gla import Gla
from refold.nn.mixers.linear_attention import LinearAttention
from refold.nn.mixers.mamba import Mamba
from refold.nn.mixers.mamba2 import Mamba2
from refold.nn.mixers.mixer import Mixer
from refold.nn.mixers.retention import Retention

MIXERS: Mapping[str, type[Mixer]] = {
    "attention": Attention,
    "retention": Retention,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "gla": Gla,
    "gated_deltanet": GatedDeltanet,
    "linear_attention": LinearAttention,
}
