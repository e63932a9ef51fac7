"""One executed layer: the tensors it owns, and how it runs the stored parts it is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from refold.blueprint.integers import find_scheme
from refold.blueprint.owned.gain import GAIN
from refold.blueprint.owned.vectors import VECTORS
from refold.blueprint.schema import POOLS, Blueprint, Pool, depth_coefficients, depth_linears
from refold.families.arch import Rope
from refold.modeling.configuration import RefoldConfig
from refold.modeling.owned_tensors import Gain, Owned, OwnedVectors
from refold.modeling.padding import as_given, in_order
from refold.nn.joined import StoredAdapter
from refold.nn.lora import Adapter, Coefficients, LinearAdapter, LoraPairs
from refold.nn.mixers.batch import Batch, DepthInputs, SharedKeys
from refold.nn.mixers.key_values import KeyHeads, KeyValue
from refold.nn.mixers.memory import StateView
from refold.nn.mixers.registry import MIXERS
from refold.nn.mixers.store import NOTHING_KEPT, Memory
from refold.nn.part import OwnVectors, StoredPart
from refold.nn.weights import Weight, stored_weights
from refold.nn.workshop import Workshop


@dataclass(frozen=True)
class Parts:
    """The stored parts that a depth runs.

    An object and no tuple, because accelerate moves every module that it finds among arguments.

    Attributes:
        mixer: None: the depth has none.
        mlp: None: the depth has none, or it shall not run.
    """

    mixer: StoredPart | None = None
    mlp: StoredPart | None = None


KeyValues = Mapping[int, KeyValue]
"""Depth to the keys and values it made in this pass, for later depths to read."""


def stack_ropes(blueprint: Blueprint) -> list[Rope]:
    """Returns the different ropes of the depths that have a mixer, in the order they occur."""
    return list(
        dict.fromkeys(each.rope for each in blueprint.depths if each.mixer is not None and each.rope is not None)
    )


_NOTHING_OWNED = Owned({}, None, None, {})


class Depth(GradientCheckpointingLayer):
    """One executed layer of the stack.

    It owns its LoRA pairs, coefficients of bases, vectors, prefix, and a parameterless view of its mixer that caches
    know by `layer_idx`. Stored parts are passed in at each call and registered elsewhere, once.

    Attributes:
        index: Its place in the stack.
        adapters_number: Names its adapters among all that the engine holds for the stack; 0: the model's own.
    """

    def __init__(self, config: RefoldConfig, blueprint: Blueprint, index: int):
        super().__init__()
        spec, arch = blueprint.depths[index], blueprint.arch
        self.index, self.spec, self.std = index, spec, config.initializer_range
        self.adapters_number = 0
        self.parallel = arch.residual == "parallel"
        linears = depth_linears(blueprint, index)
        pairs = {name: sizes for name, sizes in linears.items() if name in spec.ranks}
        schemes = {name: find_scheme(scheme) for name, scheme in spec.quantised.items()}
        sizes = {name: (spec.ranks[name], columns, rows) for name, (rows, columns) in pairs.items()}
        self.lora = LoraPairs(sizes, schemes)
        ranks = depth_coefficients(blueprint, index)
        shapes = {name: (linears[name][0], rank) for name, rank in ranks.items()}
        self.coefficients = Coefficients(shapes, config.initializer_range, schemes)
        self.gain = nn.ModuleDict({each.pool: Gain() for each in GAIN.tensors(blueprint, index) if each.pool})
        self.prefix = nn.Parameter(torch.empty(spec.prefix, arch.hidden_size)) if spec.prefix else None
        self.view: nn.Module | None = None
        self.rope = None if spec.rope is None or spec.mixer is None else stack_ropes(blueprint).index(spec.rope)
        self.heads = KeyHeads(blueprint, index) if spec.kv or blueprint.is_read(index) else None
        owned: dict[str, nn.Module] = {}
        if spec.mixer is not None:
            mixer = blueprint.mixers[spec.mixer].mixer
            self.view = MIXERS[mixer.type].view(config, blueprint.part_arch("mixer", spec.mixer), index, spec.window)
        if spec.vectors == "own":
            for pool in (each for each in POOLS if getattr(spec, each) is not None):
                tensors = [each for each in VECTORS.tensors(blueprint, index) if each.pool == pool]
                shapes = {each.local: each.shape for each in tensors}
                owned[pool] = OwnedVectors(shapes, {each.local: each.fill(blueprint) for each in tensors})
        self.vectors = nn.ModuleDict(owned)
        self._keeps_state = isinstance(self.view, StateView)
        self.packed: Owned | None = None
        # A look-up in empty module dictionaries costs microseconds, and every forward pass does it.
        self._owns_tensors = bool(owned or spec.ranks or len(self.coefficients) or len(self.gain))

    def reset(self) -> None:
        """Initialises the prefix; all other tensors are in modules of their own."""
        if self.prefix is not None:
            nn.init.normal_(self.prefix, std=self.std)

    def adapters(self) -> dict[str, Adapter]:
        """Returns LoRA pairs and coefficients by linear name."""
        # `forward` itself, which offloading replaces: a call through `nn.Module` costs a microsecond more, each time.
        coefficients = self.coefficients.forward()
        pairs = self.lora.forward()
        if not coefficients:
            return {name: Adapter(pair) for name, pair in pairs.items()}
        found = {name: Adapter(pair, coefficients.pop(name, None)) for name, pair in pairs.items()}
        return found | {name: Adapter(None, own) for name, own in coefficients.items()}

    def _stored_adapters(self) -> dict[str, StoredAdapter]:
        """Returns LoRA pairs and coefficients by linear name, those that are stored as integers as they are."""
        stored = stored_weights(self.lora.stored)
        coefficients: dict[str, Weight] = {**self.coefficients.forward(), **stored_weights(self.coefficients.stored)}
        pairs = {
            name: tuple(stored.get(side, tensor) for side, tensor in zip(self.lora.names[name], pair, strict=True))
            for name, pair in self.lora.forward().items()
        }
        names = dict.fromkeys((*pairs, *coefficients))
        return {
            name: StoredAdapter(cast("tuple[Weight, Weight] | None", pairs.get(name)), coefficients.get(name))
            for name in names
        }

    def own_vectors(self, pool: str) -> OwnVectors:
        """Returns the vectors this depth has for its `mixer` or `mlp`; None where the part holds them."""
        vectors = cast("nn.Module", self._modules["vectors"])._modules.get(pool)
        return None if vectors is None else cast("OwnedVectors", vectors).forward()

    def own_names(self) -> list[str]:
        """Returns the names of the vectors this depth has for its parts."""
        return [name for pool in self.vectors.values() for name in cast("OwnedVectors", pool).names]

    def owned(self) -> Owned:
        """Returns the tensors by which this depth changes the parts it runs."""
        if self.packed is not None:
            return self.packed
        if not self._owns_tensors:
            return _NOTHING_OWNED
        owned_gains = cast("dict[Pool, Gain]", cast("nn.Module", self._modules["gain"])._modules)
        gains: dict[Pool, Tensor] = {pool: gain.forward() for pool, gain in owned_gains.items()}
        return Owned(self.adapters(), self.own_vectors("mixer"), self.own_vectors("mlp"), gains)

    def with_adapters(
        self, config: RefoldConfig, blueprint: Blueprint, adapters: Mapping[str, Tensor], number: int
    ) -> "Depth":
        """Returns the depth with other adapters; all its other tensors are those of this one.

        Args:
            config: Of the model.
            blueprint: The stack.
            adapters: Tensors by name, all that this depth has in the group `adapters`; they are taken as they are.
            number: Names them.
        """
        with torch.device("meta"):
            other = Depth(config, blueprint, self.index)
        other.adapters_number = number
        other.vectors, other.coefficients = self.vectors, self.coefficients
        for name, tensor in adapters.items():
            owner, _, local = name.removeprefix(f"model.depths.{self.index}.").rpartition(".")
            other.get_submodule(owner)._parameters[local] = nn.Parameter(tensor, requires_grad=False)
        assert not any(each.is_meta for each in other.parameters()), "all adapters of the depth are required"
        return other.eval()

    def pack(self, parts: Parts, workshop: Workshop, formats: tuple[str, str], beside: Owned | None = None) -> None:
        """Prepares adapters and vectors for packed parts, and drops the weights of adapters they were made of.

        Args:
            parts: That the depth runs, packed.
            workshop: Prepares the products.
            formats: Of LoRA factors, and of coefficients of bases.
            beside: Of the packed depth from which this one differs in its adapters alone: its vectors and coefficients
                are used; None: the depth has its own.
        """
        owned = self.owned()
        adapters = self._stored_adapters()
        joined: dict[str, LinearAdapter] = {}
        vectors: list[OwnVectors] = []
        for part, own in ((parts.mixer, owned.mixer_vectors), (parts.mlp, owned.mlp_vectors)):
            packed = None if part is None else part.packed
            if packed is not None:
                joined |= packed.join_adapters(adapters, workshop, formats, None if beside is None else beside.adapters)
            vectors.append(own if own is None or packed is None or beside is not None else packed.join_vectors(own))
        if beside is not None:
            vectors = [beside.mixer_vectors, beside.mlp_vectors]
        gains: dict[Pool, Tensor] = {pool: gain.detach() for pool, gain in owned.gains.items()}
        self.packed = Owned(joined, vectors[0], vectors[1], gains, {})
        self.lora, self.coefficients = LoraPairs({}), Coefficients({}, self.std)

    def inputs(self, batch: Batch, memory: Memory = NOTHING_KEPT, read: tuple[KeyValue, ...] = ()) -> DepthInputs:
        """Returns the inputs of this depth's mixer.

        Args:
            batch: Of the pass.
            memory: Of this depth.
            read: Keys and values of its sources in turn.
        """
        return DepthInputs(
            None if self.rope is None else batch.rotations[self.rope],
            batch.masks.get(self.spec.window),
            batch.document_starts,
            batch.resets,
            memory,
            batch.extra,
            None if self.heads is None else SharedKeys(self.heads, read),
            self.prefix,
            batch.order,
        )

    def run(
        self,
        hidden_states: Float[Tensor, "B T D"],
        parts: Parts,
        batch: Batch,
        memory: Memory = NOTHING_KEPT,
        shared: KeyValues | None = None,
        residual: bool = True,
    ) -> tuple[Float[Tensor, "B T D"], KeyValue | None]:
        """Runs the depth in a pass over several.

        Args:
            hidden_states: The stream before it.
            parts: The mixer and the MLP it runs.
            batch: Of the pass.
            memory: Of this depth.
            shared: Keys and values of earlier depths.
            residual: As for `forward`.

        Returns:
            The stream after it; and its keys and values where later depths read them.
        """
        if self.packed is not None and self.heads is None and not self._forward_hooks:
            # Around the module's call, which costs as much as three small operations.
            inputs = self.inputs(batch, memory)
            return self.compute(hidden_states, parts, inputs, self.packed, residual)[0], None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            memory = NOTHING_KEPT  # checkpointing computes the depth again, which would write the memory twice
        given = {"parts": parts, "batch": batch, "memory": memory, "residual": residual}
        if self.heads is None:
            return self(hidden_states, **given), None
        read: tuple[Tensor, ...] = ()
        if shared is not None and not memory.attends:
            read = tuple(states for source in self.heads.sources for states in shared[source])
        found = self(hidden_states, *read, **given)
        if not self.heads.is_read:
            return found, None
        hidden_states, key, value = found
        return hidden_states, None if memory.attends else (key, value)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        *read: Tensor,
        parts: Parts,
        batch: Batch,
        memory: Memory = NOTHING_KEPT,
        residual: bool = True,
    ) -> Float[Tensor, "B T D"] | tuple[Tensor, Tensor, Tensor]:
        """Runs mixer and MLP, either of which may be absent, and adds their updates to the residual stream.

        Keys and values come as arguments and go as results, so that gradients find their way through checkpoints.

        Args:
            hidden_states: The stream before it.
            *read: Keys and values of its sources in turn, each `[B, heads, S, K]`.
            parts: The mixer and the MLP it runs.
            batch: Of the pass.
            memory: Of this depth.
            residual: False: return the mixer's update alone.

        Returns:
            The stream after it; and, where later depths read them, its keys and values.
        """
        inputs = self.inputs(batch, memory, tuple(zip(read[::2], read[1::2], strict=True)))
        stream, made = self.compute(hidden_states, parts, inputs, self.owned(), residual)
        if self.heads is None or not self.heads.is_read:
            return stream
        assert made is not None
        return (stream, *made)

    def compute(
        self,
        hidden_states: Float[Tensor, "B T D"],
        parts: Parts,
        inputs: DepthInputs,
        owned: Owned,
        residual: bool = True,
    ) -> tuple[Float[Tensor, "B T D"], KeyValue | None]:
        """Runs the parts with tensors that this depth, or several depths of as many groups of rows, own.

        Args:
            hidden_states: The stream before the parts.
            parts: Mixer and MLP.
            inputs: Of the mixer.
            owned: Adapters, vectors and gains.
            residual: As for `forward`.

        Returns:
            The stream after them; and the keys and values that were made.
        """
        update, made = None, None
        mixer, mlp = parts.mixer, parts.mlp
        if mixer is not None:
            order = inputs.order if self._keeps_state else None
            given = (hidden_states, inputs) if order is None else in_order(order, hidden_states, inputs)
            update, made = mixer(given[0], self.view, given[1], owned.adapters, owned.mixer_vectors)
            update = owned.scale("mixer", update if order is None else as_given(order, update))
        if not residual and update is not None:
            return update, made
        if self.parallel and update is not None and mlp is not None:
            # Updates first, as transformers adds them: in half precision the order shows.
            scaled = owned.scale("mlp", mlp(hidden_states, owned.adapters, owned.mlp_vectors))
            return scaled + update + hidden_states, made
        mixed = hidden_states if update is None else hidden_states + update
        if mlp is None:
            return mixed, made
        return mixed + owned.scale("mlp", mlp(mixed, owned.adapters, owned.mlp_vectors)), made
