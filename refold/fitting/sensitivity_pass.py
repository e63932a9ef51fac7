"""The pass over text, forward and back, that measures all layers of a source with one layer in memory."""

from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from refold.calibration.layers import SourceLayers
from refold.calibration.moments import MomentStore, MomentSums, keep_streams, loss_gradient, take_stream
from refold.conversion.progress import StepReport
from refold.data.packing import PackedSequence
from refold.fitting.sample import PartsSeen, SampleStore


class Ends(NamedTuple):
    """Both ends of the stack on the text.

    Attributes:
        first_gradient: Gradient of the summed loss with respect to the residual stream before the first layer.
        last_stream: The residual stream after the last layer.
    """

    first_gradient: Float[Tensor, "B T D"]
    last_stream: Float[Tensor, "B T D"]


def run_both_ways(
    layers: SourceLayers,
    packed: PackedSequence,
    moments: MomentStore,
    samples: SampleStore,
    scratch: Path,
    seed: int,
    progress: StepReport,
) -> Ends:
    """Stores the moments of every linear and the sample of every part; labels are drawn as in `measure_moments`.

    Args:
        layers: Layers of the source.
        packed: Packed tokens.
        moments: Gets the moments of inputs and of gradients, means over tokens.
        samples: Gets the samples.
        scratch: An existing folder for residual streams, which are deleted again.
        seed: Seed of the labels.
        progress: Called with the layers that have run, and twice their number.
    """
    num_layers, tokens = layers.arch.num_layers, packed.input_ids.numel()
    last = keep_streams(layers, packed, scratch, lambda done: progress(done, 2 * num_layers))
    gradient = loss_gradient(layers, last, seed)
    for done, index in enumerate(range(num_layers - 1, -1, -1), start=num_layers + 1):
        layer, sums, seen = layers.load(index), MomentSums(), PartsSeen(samples.plan)
        hidden = take_stream(scratch, index)
        gradient = layer.run_back(hidden, packed.position_ids, gradient, sums.see_input, sums.see_gradient, seen.see)
        sums.store(moments, index, tokens)
        samples.write(index, seen)
        del layer, sums, seen, hidden
        progress(done, 2 * num_layers)
    return Ends(gradient, last)
