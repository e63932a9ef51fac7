"""One executed layer: what it owns, and how it runs the stored parts it is given."""

from collections.abc import Mapping
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from refold.blueprint.schema import Blueprint
from refold.blueprint.specs.part import Fill, Shape
from refold.blueprint.specs.registry import MLP, depth_linears, find_mixer
from refold.families.arch import Norm
from refold.modeling.configuration import RefoldConfig
from refold.nn.fills import make_fill
from refold.nn.lora import LoraPair
from refold.nn.mixers.context import MixerContext
from refold.nn.mixers.registry import MIXERS
from refold.nn.part import Lora, OwnVectors, StoredPart


class OwnedVectors(nn.Module):
    """The norms and biases a depth keeps for one of its parts, under the names they have in the part."""

    def __init__(self, shapes: Mapping[str, Shape], fills: Mapping[str, Fill], norm: Norm):
        super().__init__()
        self.names = tuple(shapes)
        ones = Fill("constant", 1.0 - norm.offset)
        self.fills = {
            name: fills.get(name, ones if name.endswith("_norm.weight") else Fill("constant")) for name in shapes
        }
        for name, shape in shapes.items():
            owner, kind = name.rsplit(".", 1)
            if not hasattr(self, owner):
                self.add_module(owner, nn.Module())
            getattr(self, owner).register_parameter(kind, nn.Parameter(make_fill(self.fills[name], shape)))

    def reset(self) -> None:
        """Fills all vectors anew."""
        for name, tensor in self.tensors().items():
            tensor.data.copy_(make_fill(self.fills[name], tuple(tensor.shape)))

    def tensors(self) -> dict[str, Tensor]:
        return {name: self.get_parameter(name) for name in self.names}


class Depth(GradientCheckpointingLayer):
    """One executed layer of the stack.

    It owns its LoRA pairs, its own vectors where it has some, and a parameterless view of its mixer that caches know by
    `layer_idx`. Stored parts are passed in at each call and registered elsewhere, once.
    """

    def __init__(self, config: RefoldConfig, blueprint: Blueprint, index: int):
        super().__init__()
        spec, arch = blueprint.depths[index], blueprint.arch
        self.index, self.spec = index, spec
        self.parallel = arch.residual == "parallel"
        self.lora = nn.ModuleDict(
            {
                name: LoraPair(spec.ranks[name], columns, rows)
                for name, (rows, columns) in depth_linears(blueprint, spec).items()
                if name in spec.ranks
            }
        )
        self.view: nn.Module | None = None
        owned: dict[str, nn.Module] = {}
        if spec.mixer is not None:
            part = blueprint.mixers[spec.mixer]
            self.view = MIXERS[part.type].view(config, arch, index, spec.window)
            if spec.vectors == "own":
                mixer = find_mixer(part.type)
                fills = mixer.fills(arch, part.options)
                owned["mixer"] = OwnedVectors(mixer.vectors(arch, part.options), fills, arch.norm)
        if spec.mlp is not None and spec.vectors == "own":
            owned["mlp"] = OwnedVectors(MLP.vectors(arch, {}), {}, arch.norm)
        self.vectors = nn.ModuleDict(owned)

    def adapters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """LoRA pairs by linear name."""
        return {name: (pair.a, pair.b) for name, pair in cast("Mapping[str, LoraPair]", self.lora).items()}

    def own_vectors(self, pool: str) -> OwnVectors:
        """The vectors this depth keeps for its `mixer` or `mlp`, or None where the part holds them."""
        return cast("OwnedVectors", self.vectors[pool]).tensors() if pool in self.vectors else None

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        *,
        mixer: StoredPart | None,
        mlp: StoredPart | None,
        context: MixerContext | None,
        past_key_values: Any = None,
        residual: bool = True,
    ) -> Float[Tensor, "B T D"]:
        """Runs mixer and MLP, either of which may be absent, and adds what they give to the residual stream.

        Without `residual` it returns what the mixer gives, alone.
        """
        lora: Lora = self.adapters()
        update = None
        if mixer is not None:
            assert context is not None
            context.past_key_values = past_key_values
            update = mixer(hidden_states, self.view, context, lora, self.own_vectors("mixer"))
            if not residual:
                return update
        if self.parallel and update is not None and mlp is not None:
            # Updates first, as transformers adds them: in half precision the order shows.
            return mlp(hidden_states, lora, self.own_vectors("mlp")) + update + hidden_states
        mixed = hidden_states if update is None else hidden_states + update
        return mixed if mlp is None else mixed + mlp(mixed, lora, self.own_vectors("mlp"))
