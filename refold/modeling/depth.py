"""One executed layer: what it owns, and how it runs the stored parts it is given."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from refold.blueprint.schema import Blueprint
from refold.blueprint.tensors import depth_coefficients, depth_linears, depth_vectors
from refold.families.arch import Norm
from refold.mixers.spec import Fill, Shape
from refold.modeling.configuration import RefoldConfig
from refold.nn.fills import make_fill
from refold.nn.lora import LoraPair, Own
from refold.nn.mixers.context import MixerContext
from refold.nn.mixers.key_values import Exchange, KeyHeads, KeyValue
from refold.nn.mixers.registry import MIXERS
from refold.nn.part import Lora, OwnVectors, StoredPart

Lent = dict[int, KeyValue]
"""Depth to the keys and values it left in this pass for later depths to read."""


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
            owner, _, kind = name.rpartition(".")
            if owner and not hasattr(self, owner):
                self.add_module(owner, nn.Module())
            self.get_submodule(owner).register_parameter(kind, nn.Parameter(make_fill(self.fills[name], shape)))

    def reset(self) -> None:
        """Fills all vectors anew."""
        for name, tensor in self.tensors().items():
            tensor.data.copy_(make_fill(self.fills[name], tuple(tensor.shape)))

    def tensors(self) -> dict[str, Tensor]:
        return {name: self.get_parameter(name) for name in self.names}


class Depth(GradientCheckpointingLayer):
    """One executed layer of the stack.

    It owns its LoRA pairs, coefficients of bases, own vectors where it has some, and a parameterless view of its mixer
    that caches know by `layer_idx`. Stored parts are passed in at each call and registered elsewhere, once.
    """

    def __init__(self, config: RefoldConfig, blueprint: Blueprint, index: int):
        super().__init__()
        spec, arch = blueprint.depths[index], blueprint.arch
        self.index, self.spec = index, spec
        self.parallel = arch.residual == "parallel"
        linears = depth_linears(blueprint, index)
        self.lora = nn.ModuleDict(
            {
                name: LoraPair(spec.ranks[name], columns, rows)
                for name, (rows, columns) in linears.items()
                if name in spec.ranks
            }
        )
        self.coefficients = nn.ParameterDict(
            {
                name: nn.Parameter(torch.empty(linears[name][0], rank))
                for name, rank in depth_coefficients(blueprint, index).items()
            }
        )
        self.prefix = nn.Parameter(torch.empty(spec.prefix, arch.hidden_size)) if spec.prefix else None
        self.view: nn.Module | None = None
        self.heads = KeyHeads(blueprint, index) if spec.kv or blueprint.is_read(index) else None
        owned: dict[str, nn.Module] = {}
        if spec.mixer is not None:
            mixer = blueprint.mixers[spec.mixer].mixer
            self.view = MIXERS[mixer.type].view(config, arch, index, spec.window)
            if spec.vectors == "own":
                vectors = depth_vectors(blueprint, index, "mixer")
                owned["mixer"] = OwnedVectors(vectors, mixer.fills(arch), arch.norm)
        if spec.mlp is not None and spec.vectors == "own":
            owned["mlp"] = OwnedVectors(depth_vectors(blueprint, index, "mlp"), {}, arch.norm)
        self.vectors = nn.ModuleDict(owned)

    def adapters(self) -> dict[str, Own]:
        """LoRA pairs and coefficients by linear name."""
        pairs, coefficients = cast("Mapping[str, LoraPair]", self.lora), dict(self.coefficients.items())
        found = {name: Own(pair.pair, coefficients.pop(name, None)) for name, pair in pairs.items()}
        return found | {name: Own(None, own) for name, own in coefficients.items()}

    def own_vectors(self, pool: str) -> OwnVectors:
        """The vectors this depth keeps for its `mixer` or `mlp`, or None where the part holds them."""
        return cast("OwnedVectors", self.vectors[pool]).tensors() if pool in self.vectors else None

    def run(self, hidden_states: Float[Tensor, "B T D"], lent: Lent, **arguments: Any) -> Float[Tensor, "B T D"]:
        """Runs the depth in a pass over several.

        Args:
            hidden_states: The stream before it.
            lent: Keys and values that earlier depths left; what later ones read of this depth is added.
            **arguments: As for `forward`.
        """
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            arguments["cache"] = None  # it would be written again when the depth is computed again
        if self.heads is None:
            return self(hidden_states, **arguments)
        found = self(hidden_states, *(states for source in self.heads.sources for states in lent[source]), **arguments)
        if not self.heads.is_read:
            return found
        hidden_states, key, value = found
        lent[self.index] = key, value
        return hidden_states

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        *read: Tensor,
        mixer: StoredPart | None,
        mlp: StoredPart | None,
        context: MixerContext | None,
        cache: Any = None,
        residual: bool = True,
    ) -> Float[Tensor, "B T D"] | tuple[Tensor, Tensor, Tensor]:
        """Runs mixer and MLP, either of which may be absent, and adds what they give to the residual stream.

        Keys and values come as arguments and go as results, so that gradients find their way through checkpoints.

        Args:
            hidden_states: The stream before it.
            *read: Keys and values of its sources in turn, each `[B, heads, S, K]`.
            mixer: The stored part it runs.
            mlp: The stored part it runs.
            context: What the mixer needs besides.
            cache: Cache indexed by depth, or None.
            residual: False: return what the mixer gives, alone.

        Returns:
            The stream after it; and, where later depths read them, its keys and values.
        """
        lora: Lora = self.adapters()
        update = None
        if mixer is not None:
            assert context is not None
            context.cache = cache
            pairs = tuple(zip(read[::2], read[1::2], strict=True))
            context.prefix = self.prefix
            context.exchange = None if self.heads is None else Exchange(self.heads, pairs)
            update = mixer(hidden_states, self.view, context, lora, self.own_vectors("mixer"))
        stream = self._add(hidden_states, update, mlp, lora) if residual or update is None else update
        if self.heads is None or not self.heads.is_read:
            return stream
        assert context is not None
        assert context.exchange is not None
        assert context.exchange.made is not None
        return (stream, *context.exchange.made)

    def _add(self, hidden_states: Tensor, update: Tensor | None, mlp: StoredPart | None, lora: Lora) -> Tensor:
        if self.parallel and update is not None and mlp is not None:
            # Updates first, as transformers adds them: in half precision the order shows.
            return mlp(hidden_states, lora, self.own_vectors("mlp")) + update + hidden_states
        mixed = hidden_states if update is None else hidden_states + update
        return mixed if mlp is None else mixed + mlp(mixed, lora, self.own_vectors("mlp"))
