"""Mixers with a state of constant size: read the inputs, mix them with the state, finish and write."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from refold.nn.mixers.batch import DepthInputs
from refold.nn.mixers.key_values import KeyValue
from refold.nn.mixers.mixer import Mixer
from refold.nn.part import Lora, OwnVectors


@dataclass(frozen=True)
class HeadReads:
    """Queries, keys and values of one call.

    Attributes:
        x: The normed hidden states they were projected from.
        query: `[B, T, heads, size]`.
        key: Likewise.
        value: Likewise.
        beside: Outputs of other linears that read `x`, by name, where they were run together with these.
    """

    x: Float[Tensor, "B T D"]
    query: Tensor
    key: Tensor
    value: Tensor
    beside: Mapping[str, Tensor] = field(default_factory=dict)


class StateMixer(Mixer):
    """A mixer that carries a recurrent state from token to token.

    Attributes:
        write: Output projection and, where there is one, output norm.
    """

    write: Callable[[Tensor, Lora, OwnVectors], Tensor]

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        view: nn.Module,
        inputs: DepthInputs,
        lora: Lora,
        vectors: OwnVectors,
    ) -> tuple[Float[Tensor, "B T D"], KeyValue | None]:
        reads = self.read_inputs(hidden_states, inputs, lora, vectors)
        mixed, state = self.mix(reads, inputs.memory.state(), inputs.resets, lora, vectors)
        inputs.memory.keep_state(state)
        return self.write(self.finish(reads, mixed, lora, vectors), lora, vectors), None

    def fill(self, hidden_states: Float[Tensor, "B T D"], inputs: DepthInputs, lora: Lora, vectors: OwnVectors) -> None:
        # Not the method of attention, whose weights some mixers with a state inherit.
        Mixer.fill(self, hidden_states, inputs, lora, vectors)

    @abstractmethod
    def read_inputs(
        self, hidden_states: Float[Tensor, "B T D"], inputs: DepthInputs, lora: Lora, vectors: OwnVectors
    ) -> Any:
        """Projects the hidden states to the inputs of `mix`; a convolution or a window keeps its last inputs."""

    @abstractmethod
    def mix(
        self, reads: Any, state: Tensor | None, resets: Bool[Tensor, "B T"] | None, lora: Lora, vectors: OwnVectors
    ) -> tuple[Tensor, Tensor]:
        """Runs the recurrence and returns its outputs and the state after the last token."""

    @abstractmethod
    def finish(self, reads: Any, mixed: Tensor, lora: Lora, vectors: OwnVectors) -> Float[Tensor, "B T W"]:
        """Norms and gates the outputs of the recurrence, all heads side by side."""
