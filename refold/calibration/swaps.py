"""Other mixers in the place of one layer's attention, run on text without any training."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refold.blueprint.schema import Blueprint, MixerPart
from refold.calibration.layers import AttentionSample, SourceLayers
from refold.mixers.spec import MixerSpec
from refold.modeling.configuration import RefoldConfig
from refold.modeling.depth import Depth
from refold.modeling.stack import RefoldModel
from refold.nn.fills import make_fill
from refold.nn.mixers.attention import AttentionMixer, AttentionView
from refold.nn.mixers.batch import Batch
from refold.nn.rotary import Rotary
from refold.planning.build import identity_blueprint


class SampledStream(NamedTuple):
    """The residual stream before a layer on some sequences.

    Attributes:
        states: Float32.
        positions: Positions within documents.
    """

    states: Float[Tensor, "B T D"]
    positions: Int[Tensor, "B T"]


class MixerSwap:
    """The mixers that could stand in the place of one layer's attention, each with the layer's own weights.

    Args:
        layers: Layers of the source.
        index: The layer.
        stream: The residual stream that the layer's attention reads.
    """

    def __init__(self, layers: SourceLayers, index: int, stream: SampledStream):
        self.arch, self.index, self.stream = layers.arch, index, stream
        self._layers = layers

    def start(self, mixer: MixerSpec) -> dict[str, Tensor]:
        """Returns the fresh vectors of a mixer, float32, by name; all other tensors are the source's."""
        carried, vectors = mixer.carried(self.arch), mixer.vectors(self.arch)
        fills = mixer.fills(self.arch)
        return {
            name: make_fill(fills[name], shape, torch.Generator().manual_seed(0))
            for name, shape in vectors.items()
            if name not in carried
        }

    def attention(self, num_sequences: int, num_tokens: int) -> AttentionSample:
        """Returns the source's attention on the first tokens of the first sequences, to which a map is fitted."""
        states, positions = (each[:num_sequences, :num_tokens] for each in self.stream)
        return self._layers.load(self.index, ("mixer",)).attention(states, positions)

    @torch.no_grad()
    def update(self, mixer: MixerSpec, window: int | None, fresh: Mapping[str, Tensor]) -> Float[Tensor, "B T D"]:
        """Returns the update of another mixer, output norm included.

        Args:
            mixer: The mixer, resolved against the source; every linear of it is the source's.
            window: Number of tokens that a token attends to; None: all, or a recurrent state.
            fresh: The vectors that the source does not have, as `start` returns them.
        """
        model = _load(self._layers, self.index, mixer, window, fresh)
        found = [
            model.run(range(1), states, batch).hidden_states - states for states, batch in _rows(model, self.stream)
        ]
        return torch.cat(found).cpu()

    @torch.no_grad()
    def update_with_keys(self, earlier: int, stream: SampledStream) -> Float[Tensor, "B T D"]:
        """Returns the attention's update with keys and values that an earlier layer computes from its own stream.

        Args:
            earlier: The earlier layer, whose window and rotary embedding are those of this one.
            stream: The residual stream that the earlier layer reads, for the same tokens.
        """
        attention = MixerPart().mixer
        window = self.arch.layers[self.index].window
        model, other = (_load(self._layers, layer, attention, window, {}) for layer in (self.index, earlier))
        mixer, read = (cast("AttentionMixer", each.mixers[0]) for each in (model, other))
        depth = cast("Depth", model.depths[0])
        found = []
        for (states, batch), (before, _) in zip(_rows(model, self.stream), _rows(other, stream), strict=True):
            inputs = depth.inputs(batch)
            query = mixer.read_query(states, inputs.rotation, {}, None)
            _, key, value = read.read(before, inputs.rotation, {}, None)
            view = cast("AttentionView", depth.view)
            heads, _ = view(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), inputs)
            found.append(mixer.write(heads.reshape(*query.shape[:2], -1), {}, None))
        return torch.cat(found).cpu()


def _rows(model: RefoldModel, stream: SampledStream) -> Iterator[tuple[Tensor, Batch]]:
    """Yields one sequence at a time: weights of attention have the square of its tokens."""
    device = next(model.mixers.parameters()).device
    for states, places in zip(*stream, strict=True):
        one = states[None].to(device)
        yield one, model.batch(one, position_ids=places[None].to(device))


def _load(
    layers: SourceLayers, index: int, mixer: MixerSpec, window: int | None, fresh: Mapping[str, Tensor]
) -> RefoldModel:
    with torch.device("meta"):
        model = RefoldModel(RefoldConfig(blueprint=_alone(layers, index, mixer, window).model_dump(mode="json"))).eval()
    carried = mixer.carried(layers.arch)
    read = {
        name: layers.pieces.read(carried[name].canonical, index, torch.float32) if name in carried else fresh[name]
        for name in model.mixers[0].state_dict()
    }
    model.mixers[0].load_state_dict({name: each.to(layers.device) for name, each in read.items()}, assign=True)
    for rotary in model.rotaries:
        cast("Rotary", rotary.to_empty(device=layers.device)).reset()
    return model.requires_grad_(False)


def _alone(layers: SourceLayers, index: int, mixer: MixerSpec, window: int | None) -> Blueprint:
    """Returns a stack of one depth with this mixer and without an MLP."""
    arch = layers.arch
    alone = identity_blueprint(arch.model_copy(update={"layers": (arch.layers[index],), "vocab_size": 1}))
    rope = arch.layers[index].rope if mixer.is_rotary else None
    depth = alone.depths[0].model_copy(update={"mlp": None, "window": window, "rope": rope})
    part = MixerPart(sources=(0,), mixer=mixer)
    return alone.model_copy(update={"mixers": (part,), "mlps": (), "depths": (depth,)})
