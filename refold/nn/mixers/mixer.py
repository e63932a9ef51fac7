"""The interface of all token mixers."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from refold.families.arch import ArchSpec
from refold.nn.mixers.context import MixerContext
from refold.nn.part import Lora, OwnVectors, StoredPart


class Mixer(StoredPart):
    """A stored part that moves information between tokens."""

    @classmethod
    def create(cls, arch: ArchSpec, options: dict[str, Any], stores_vectors: bool) -> "Mixer":
        """Builds the stored part of one entry of a blueprint's `mixers`."""
        raise NotImplementedError

    @classmethod
    def view(cls, config: PreTrainedConfig, arch: ArchSpec, layer_idx: int, window: int | None) -> nn.Module:
        """Builds one depth's parameterless view of the mixer: its place in the cache, its window, its scale."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        view: nn.Module,
        context: MixerContext,
        lora: Lora,
        vectors: OwnVectors,
    ) -> Float[Tensor, "B T D"]:
        """Returns what the mixer adds to the residual stream at the depth whose view is given."""
        raise NotImplementedError
