"""One executed layer: what it owns, and how it runs the stored parts it is given."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from refold.blueprint.contents import depth_coefficients, depth_linears
from refold.blueprint.owned.gain import GAIN
from refold.blueprint.owned.vectors import VECTORS
from refold.blueprint.schema import POOLS, Blueprint, Pool
from refold.mixers.spec import Fill, Shape
from refold.modeling.configuration import RefoldConfig
from refold.modeling.padding import as_given, in_order
from refold.nn.fills import make_fill
from refold.nn.lora import LoraPair, Own
from refold.nn.mixers.context import MixerContext
from refold.nn.mixers.key_values import Exchange, KeyHeads, KeyValue
from refold.nn.mixers.memory import StateView
from refold.nn.mixers.registry import MIXERS
from refold.nn.part import Lora, OwnVectors, StoredPart

Lent = dict[int, KeyValue]
"""Depth to the keys and values it left in this pass for later depths to read."""


class OwnedVectors(nn.Module):
    """The norms and biases a depth keeps for one of its parts, under the names they have in the part."""

    def __init__(self, shapes: Mapping[str, Shape], fills: Mapping[str, Fill]):
        super().__init__()
        self.names, self.fills = tuple(shapes), dict(fills)
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


class Coefficients(nn.ParameterDict):
    """The coefficients B `[out, rank]` that a depth has for bases of its parts, by linear name."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], std: float):
        super().__init__({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
        self.std = std

    def reset(self) -> None:
        """Initialises all coefficients."""
        for coefficients in self.values():
            nn.init.normal_(coefficients, std=self.std)


class Gain(nn.Module):
    """The scale on everything that one part of a depth adds to the residual stream; 1 at first."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def reset(self) -> None:
        """Initialises the scale without effect."""
        nn.init.ones_(self.weight)

    def forward(self, update: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Returns the scaled update."""
        return update * self.weight


class Depth(GradientCheckpointingLayer):
    """One executed layer of the stack.

    It owns its LoRA pairs, coefficients of bases, own vectors where it has some, and a parameterless view of its mixer
    that caches know by `layer_idx`. Stored parts are passed in at each call and registered elsewhere, once.
    """

    def __init__(self, config: RefoldConfig, blueprint: Blueprint, index: int):
        super().__init__()
        spec, arch = blueprint.depths[index], blueprint.arch
        self.index, self.spec, self.std = index, spec, config.initializer_range
        self.parallel = arch.residual == "parallel"
        linears = depth_linears(blueprint, index)
        self.lora = nn.ModuleDict(
            {
                name: LoraPair(spec.ranks[name], columns, rows)
                for name, (rows, columns) in linears.items()
                if name in spec.ranks
            }
        )
        ranks = depth_coefficients(blueprint, index)
        shapes = {name: (linears[name][0], rank) for name, rank in ranks.items()}
        self.coefficients = Coefficients(shapes, config.initializer_range)
        self.gain = nn.ModuleDict({each.pool: Gain() for each in GAIN.tensors(blueprint, index) if each.pool})
        self.prefix = nn.Parameter(torch.empty(spec.prefix, arch.hidden_size)) if spec.prefix else None
        self.view: nn.Module | None = None
        self.heads = KeyHeads(blueprint, index) if spec.kv or blueprint.is_read(index) else None
        owned: dict[str, nn.Module] = {}
        if spec.mixer is not None:
            mixer = blueprint.mixers[spec.mixer].mixer
            self.view = MIXERS[mixer.type].view(config, arch, index, spec.window)
        if spec.vectors == "own":
            for pool in (each for each in POOLS if getattr(spec, each) is not None):
                tensors = [each for each in VECTORS.tensors(blueprint, index) if each.pool == pool]
                shapes = {each.local: each.shape for each in tensors}
                owned[pool] = OwnedVectors(shapes, {each.local: each.fill(blueprint) for each in tensors})
        self.vectors = nn.ModuleDict(owned)

    def reset(self) -> None:
        """Initialises the prefix; all else is in modules of its own."""
        if self.prefix is not None:
            nn.init.normal_(self.prefix, std=self.std)

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
            order = context.order if isinstance(self.view, StateView) else None
            given = (hidden_states, context) if order is None else in_order(order, hidden_states, context)
            update = mixer(given[0], self.view, given[1], lora, self.own_vectors("mixer"))
            update = self._scale("mixer", update if order is None else as_given(order, update))
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
            return self._scale("mlp", mlp(hidden_states, lora, self.own_vectors("mlp"))) + update + hidden_states
        mixed = hidden_states if update is None else hidden_states + update
        return mixed if mlp is None else mixed + self._scale("mlp", mlp(mixed, lora, self.own_vectors("mlp")))

    def _scale(self, pool: Pool, update: Tensor) -> Tensor:
        return self.gain[pool](update) if self.spec.gain == "own" else update
