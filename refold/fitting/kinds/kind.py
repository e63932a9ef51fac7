"""The interface of a kind of choice: the forms it offers for a measured part, and how it writes one into a recipe."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from refold.blueprint.schema import Pool
from refold.calibration.weighting import Moments
from refold.families.arch import ArchSpec
from refold.fitting.menu import MenuMatrix, PartForm


@dataclass(frozen=True)
class PartSample:
    """Inputs, updates and gradients of a part on some tokens of the calibration text; rows are tokens, float32.

    Attributes:
        inputs: The residual stream that the part reads `[S, D]`.
        updates: What the part adds to the stream `[S, D]`, output norms included.
        gradients: Gradient of each token's loss with respect to the stream after the part `[S, D]`; labels are drawn
            from the model's predictions, so E[(g . e)^2] / 2 estimates the loss of an error e of the update.
        positions: Sequence and place in its document of each token `[S, 2]`. Sequences are whole, one after another,
            and of one length.
    """

    inputs: Tensor
    updates: Tensor
    gradients: Tensor
    positions: Tensor

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return int(self.positions[-1, 0]) + 1

    def by_sequence(self, rows: Tensor) -> Tensor:
        """Returns rows `[S, ...]` as `[B, T, ...]`."""
        return rows.unflatten(0, (self.num_sequences, -1))

    def loss_of(self, errors: Tensor) -> float:
        """Returns the predicted loss E[(g . e)^2] / 2 of errors `[S, D]` of the updates, in nats per token."""
        return mean_loss(self.gradients, errors)


@dataclass(frozen=True)
class MeasuredPart:
    """One mixer or MLP of the source with everything measured about it, one at a time in memory.

    Attributes:
        arch: The source.
        layer: Index of the layer.
        pool: Pool of the part.
        weights: Weight `[out, in]` of each linear, float32.
        moments: Moments of each linear.
        sample: Tokens seen at the part.
        before: The sample of the MLP before a mixer, or of the mixer before an MLP; None at the first part.
        context: Tokens at which cache and FLOPs are counted.
        multiple: Numbers of neurons are multiples of this number.
        extras: Measurements for some kinds, by the kind's name: for `drop` the mean of (g . u)^2 / 2 over all tokens of
            the text, for `mixer` a `refold.calibration.swaps.MixerSwap`, for `share_kv` a function that computes the
            part's update with the keys and values of the layer before.
    """

    arch: ArchSpec
    layer: int
    pool: Pool
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Moments]
    sample: PartSample
    context: int
    before: PartSample | None = None
    multiple: int = 32
    extras: Mapping[str, Any] = field(default_factory=dict)


def mean_loss(gradients: Tensor, errors: Tensor) -> float:
    """Returns E[(g . e)^2] / 2 over tokens, the loss of errors `[S, D]` in nats per token to second order."""
    return float((gradients.double() * errors.double()).sum(dim=-1).square().mean()) / 2


class PartKind:
    """A kind of choice about parts."""

    name: ClassVar[str]
    """Name in menus and reports, such as `width`."""
    pools: ClassVar[Sequence[Pool]]
    """Pools that the kind applies to."""

    def forms(self, part: MeasuredPart, whole: Sequence[MenuMatrix]) -> Iterator[PartForm]:
        """Yields the forms of a part.

        Args:
            part: The measured part.
            whole: The matrices of the whole part with all their forms, to be kept, scaled or left out.
        """
        raise NotImplementedError

    def write(self, recipe: dict[str, Any], arch: ArchSpec, chosen: Mapping[int, PartForm], pool: Pool) -> None:
        """Writes the chosen forms of this kind into a recipe.

        Args:
            recipe: The recipe as a mapping, edited in place.
            arch: The source.
            chosen: The forms of this kind, by source layer.
            pool: Pool of the parts.
        """
        raise NotImplementedError
