"""The interface of all token mixers."""

from jaxtyping import Float
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from refold.errors import RefoldError
from refold.families.arch import ArchSpec
from refold.mixers.spec import MixerSpec
from refold.nn.mixers.batch import DepthInputs
from refold.nn.mixers.key_values import KeyValue
from refold.nn.part import Lora, OwnVectors, StoredPart


class Mixer(StoredPart):
    """A stored part that moves information between tokens.

    Attributes:
        num_matrix_heads: Heads of the token-mixing matrix that `matrix` returns; None: there is no such matrix.
        branches: Names of the branches whose outputs the mixer adds; empty for a mixer without several.
        dropped_branch: The branch that the next calls leave out, for measurements; None: all of them run.
    """

    num_matrix_heads: int | None = None
    branches: tuple[str, ...] = ()
    dropped_branch: str | None = None

    @classmethod
    def create(cls, arch: ArchSpec, spec: MixerSpec, stores_vectors: bool) -> "Mixer":
        """Builds the module of a stored mixer, from the typed object that the blueprint holds."""
        raise NotImplementedError

    @classmethod
    def view(cls, config: PreTrainedConfig, arch: ArchSpec, layer_idx: int, window: int | None) -> nn.Module:
        """Builds one depth's parameterless view of the mixer: its place in the cache, its window, its scale."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        view: nn.Module,
        inputs: DepthInputs,
        lora: Lora,
        vectors: OwnVectors,
    ) -> tuple[Float[Tensor, "B T D"], KeyValue | None]:
        """Runs the mixer at the depth whose view is given.

        Returns:
            The update of the residual stream; and the keys and values the depth makes, where later depths may read them
            (None where it makes none).
        """
        raise NotImplementedError

    def fill(self, hidden_states: Float[Tensor, "B T D"], inputs: DepthInputs, lora: Lora, vectors: OwnVectors) -> None:
        """Appends keys and values of tokens to the memory, without attention.

        Raises:
            RefoldError: The mixer keeps a recurrent state, which only a full run of the mixer can advance.
        """
        raise RefoldError(
            f"fill: a mixer that keeps keys and values is required (got {type(self).__name__}); run the depth instead"
        )

    def matrix(
        self,
        hidden_states: Float[Tensor, "B T D"],
        view: nn.Module,
        inputs: DepthInputs,
        lora: Lora,
        vectors: OwnVectors,
    ) -> Float[Tensor, "B H T T"]:
        """Returns the matrix by which the mixer mixes tokens, for mixers whose `num_matrix_heads` is not None.

        Row t holds the weight of each token in the output of token t, head by head. Arguments are those of `forward`,
        without a cache and without padding: windows and documents are kept apart, other masks are ignored.
        """
        raise NotImplementedError
