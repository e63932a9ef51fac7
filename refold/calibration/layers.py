"""Layers of a source, run one by one: residual streams, inputs of linears, attention, and gradients."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from refold.blueprint.schema import POOLS, Blueprint, Pool
from refold.data.packing import PackedSequence
from refold.families.arch import ArchSpec
from refold.modeling.configuration import RefoldConfig
from refold.modeling.depth import Depth
from refold.modeling.stack import RefoldModel
from refold.nn.mixers.attention import AttentionMixer
from refold.nn.mixers.batch import Batch
from refold.nn.norms import StackNorm
from refold.nn.rotary import Rotary
from refold.planning.build import identity_blueprint
from refold.scoring.head import Head
from refold.sources.pieces import PieceReader
from refold.sources.source_model import SourceModel

EMBEDDING = "embed_tokens.weight"

Watch = Callable[[int, str, Tensor], None]
"""Called with a layer's index, a linear's name (`q_proj`, `down_proj`) and its inputs `[B, T, in]`, or the
gradients of its outputs `[B, T, out]`, on the layer's device."""

WatchPart = Callable[[int, Pool, Tensor, Tensor], None]
"""Called with a layer's index, a pool, the residual stream `[B, T, D]` that its part reads, and the part's update."""

WatchPartBack = Callable[[int, Pool, Tensor, Tensor, Tensor], None]
"""Called as `WatchPart`, and with the gradient `[B, T, D]` with respect to the update, which is the gradient with
respect to the residual stream after the part."""


class AttentionSample(NamedTuple):
    """Attention of one source layer on some sequences, in float32.

    Attributes:
        query: Queries, normalised and rotated, times the square root of the attention's scale.
        key: Keys, likewise, with key-value heads repeated for all query heads.
        weights: The softmax, with the layer's window, soft-cap and documents.
        resets: True where a document begins.
    """

    query: Float[Tensor, "B T H K"]
    key: Float[Tensor, "B T H K"]
    weights: Float[Tensor, "B H T T"]
    resets: Bool[Tensor, "B T"]

    def rows(self, chosen: Sequence[int] | slice) -> "AttentionSample":
        """Returns some of the sequences."""
        return AttentionSample(*(part[chosen] for part in self))


class _InputReached(Exception):
    """Ends a forward pass at the module whose input was asked for."""


def reach_input(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """Returns the input of a module; the forward pass `run` ends there."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _InputReached

    hook = module.register_forward_pre_hook(stop)
    try:
        run()
    except _InputReached:
        pass
    finally:
        hook.remove()
    return seen[0]


class SourceLayer:
    """One layer of a source, loaded in float32.

    Args:
        model: A stack of this layer alone, without a usable embedding.
        index: Index among the source's layers.
        arch: The source's architecture.
        device: Device of the layer; results come back to the CPU.
        rows_at_once: Number of sequences that run at once.
    """

    def __init__(self, model: RefoldModel, index: int, arch: ArchSpec, device: str, rows_at_once: int):
        self.index = index
        self._model, self._arch, self._device, self._rows_at_once = model, arch, device, rows_at_once

    @torch.no_grad()
    def run(
        self,
        hidden_states: Float[Tensor, "B T D"],
        positions: Int[Tensor, "B T"] | None,
        watch: Watch | None = None,
        watch_part: WatchPart | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Returns the residual stream after the layer.

        Args:
            hidden_states: The residual stream before it.
            positions: Positions within documents; None: every row is one document.
            watch: Called with the inputs of every linear of the layer, some sequences at a time.
            watch_part: Called with the input and the update of attention and MLP, norms included, likewise.
        """
        hooks = [] if watch is None else self._watch(watch)
        hooks += [] if watch_part is None else self._watch_parts(watch_part)
        try:
            parts = [self._run(states, batch).cpu() for states, batch in self._pieces(hidden_states, positions)]
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(parts)

    @torch.no_grad()
    def input_of(
        self, linear: str, hidden_states: Float[Tensor, "B T D"], positions: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T in"]:
        """Returns the input of a linear of the layer, on the layer's device; later modules do not run.

        Args:
            linear: `q_proj`, `down_proj`, ...
            hidden_states: The residual stream before the layer, for at most `rows_at_once` sequences.
            positions: Positions within documents; None: every row is one document.
        """
        ((states, batch),) = self._pieces(hidden_states, positions)
        return reach_input(dict(self._linears())[linear], lambda: self._run(states, batch))

    @torch.enable_grad()
    def run_back(
        self,
        hidden_states: Float[Tensor, "B T D"],
        positions: Int[Tensor, "B T"] | None,
        gradient: Float[Tensor, "B T D"],
        watch: Watch,
        watch_gradient: Watch,
        watch_part: WatchPartBack | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Returns the gradient of the loss with respect to the residual stream before the layer; weights get none.

        Args:
            hidden_states: The residual stream before the layer.
            positions: Positions within documents; None: every row is one document.
            gradient: Gradient with respect to the residual stream after the layer.
            watch: Called with the inputs of every linear.
            watch_gradient: Called with the gradients with respect to the outputs of every linear.
            watch_part: Called with input, update and gradient of attention and MLP, some sequences at a time.
        """
        hooks = self._watch(watch)
        hooks += self._watch_gradients(watch_gradient, hooks)
        hooks += [] if watch_part is None else self._watch_parts_back(watch_part, hooks)
        found, first = [], 0
        try:
            for states, batch in self._pieces(hidden_states, positions):
                states = states.detach().requires_grad_()
                after = self._run(states, batch)
                after.backward(gradient[first : first + len(states)].to(after.device))
                assert states.grad is not None
                found.append(states.grad.cpu())
                first += len(states)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(found)

    @torch.no_grad()
    def attention(self, hidden_states: Float[Tensor, "B T D"], positions: Int[Tensor, "B T"] | None) -> AttentionSample:
        """Returns queries, keys and the softmax of the layer's attention; arguments as for `run`."""
        mixer, depth = cast("AttentionMixer", self._model.mixers[0]), cast("Depth", self._model.depths[0])
        root_scale = self._arch.attention_scale**0.5
        groups = self._arch.num_attention_heads // self._arch.num_key_value_heads
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for states, batch in self._pieces(hidden_states, positions):
            inputs = depth.inputs(batch)
            query, key, _ = mixer.read(states, inputs.rotation, {}, None)
            weights = mixer.matrix(states, cast("nn.Module", depth.view), inputs, {}, None)
            wide = key.repeat_interleave(groups, dim=2)
            found.append((query.cpu() * root_scale, wide.cpu() * root_scale, weights.cpu()))
        resets = torch.zeros(hidden_states.shape[:2], dtype=torch.bool) if positions is None else positions == 0
        query, key, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
        return AttentionSample(query, key, weights, resets)

    def _run(self, states: Tensor, batch: Batch) -> Tensor:
        return self._model.run(range(1), states, batch).hidden_states

    def _pieces(self, hidden_states: Tensor, positions: Tensor | None) -> Iterator[tuple[Tensor, Batch]]:
        for first in range(0, len(hidden_states), self._rows_at_once):
            rows = slice(first, first + self._rows_at_once)
            states = hidden_states[rows].to(self._device)
            places = None if positions is None else positions[rows].to(self._device)
            yield states, self._model.batch(states, position_ids=places)

    def _linears(self) -> list[tuple[str, nn.Linear]]:
        parts = (*self._model.mixers, *self._model.mlps)
        return [(name, each) for part in parts for name, each in part.named_children() if isinstance(each, nn.Linear)]

    def _watch(self, watch: Watch) -> list[torch.utils.hooks.RemovableHandle]:
        def tell(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, inputs: watch(self.index, name, inputs[0])

        return [linear.register_forward_pre_hook(tell(name)) for name, linear in self._linears()]

    def _watch_parts(self, watch: WatchPart) -> list[torch.utils.hooks.RemovableHandle]:
        def tell(pool: Pool) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
            # A mixer returns its update and the keys and values it made.
            return lambda module, inputs, output: watch(
                self.index, pool, inputs[0], output[0] if isinstance(output, tuple) else output
            )

        return [part.register_forward_hook(tell(pool)) for pool, part in self._parts()]

    def _watch_parts_back(
        self, watch: WatchPartBack, hooks: list[torch.utils.hooks.RemovableHandle]
    ) -> list[torch.utils.hooks.RemovableHandle]:
        """Registers hooks on updates and adds them to `hooks`, as `_watch_gradients` does."""

        def tell(pool: Pool) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
                stream, update = inputs[0], output[0] if isinstance(output, tuple) else output
                hooks.append(
                    update.register_hook(
                        lambda gradient: watch(self.index, pool, stream.detach(), update.detach(), gradient)
                    )
                )

            return hook

        return [part.register_forward_hook(tell(pool)) for pool, part in self._parts()]

    def _parts(self) -> list[tuple[Pool, nn.Module]]:
        pools: tuple[tuple[Pool, nn.ModuleList], ...] = (("mixer", self._model.mixers), ("mlp", self._model.mlps))
        return [(pool, part) for pool, parts in pools for part in parts]

    def _watch_gradients(
        self, watch: Watch, hooks: list[torch.utils.hooks.RemovableHandle]
    ) -> list[torch.utils.hooks.RemovableHandle]:
        """Registers hooks on outputs and adds them to `hooks`: a hook that stays would keep the layer in memory."""

        def tell(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                hooks.append(output.register_hook(lambda gradient: watch(self.index, name, gradient)))

            return hook

        return [linear.register_forward_hook(tell(name)) for name, linear in self._linears()]


class SourceLayers:
    """Loads a source's layers one by one, and runs sequences through them.

    Args:
        model: The source.
        pieces: Reader of its weights.
        device: Device that runs layers.
        rows_at_once: Sequences that a layer computes at once.
    """

    def __init__(self, model: SourceModel, pieces: PieceReader, device: str = "cpu", rows_at_once: int = 4):
        self.model, self.pieces, self.device, self._rows_at_once = model, pieces, device, rows_at_once
        self.arch = model.arch

    def with_pieces(self, pieces: PieceReader) -> "SourceLayers":
        """Returns the same source with another reader of its weights."""
        return SourceLayers(self.model, pieces, self.device, self._rows_at_once)

    def embed(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Returns the residual stream before the first layer."""
        # Read in the dtype of the file, so that only the rows of these tokens are read from disk.
        table = self.pieces.read(EMBEDDING, None, getattr(torch, self.model.dtype))
        return table[input_ids].float() * self.arch.embedding_scale

    def load(self, index: int, pools: Sequence[Pool] = POOLS) -> SourceLayer:
        """Loads one layer; with `pools=("mixer",)` the layer has only its attention, with `("mlp",)` only its MLP."""
        blueprint = _lone_layer(self.arch, index, pools)
        # The meta device takes no memory for the unused embedding and no time for weights that are replaced at once.
        with torch.device("meta"):
            model = RefoldModel(RefoldConfig(blueprint=blueprint.model_dump(mode="json"))).eval()
        for pool, parts in (("mixer", model.mixers), ("mlp", model.mlps)):
            for part in parts:
                read = {name: self.pieces.read(f"{pool}.{name}", index, torch.float32) for name in part.state_dict()}
                part.load_state_dict({name: each.to(self.device) for name, each in read.items()}, assign=True)
        for rotary in model.rotaries:
            cast("Rotary", rotary.to_empty(device=self.device)).reset()
        model.requires_grad_(False)
        return SourceLayer(model, index, self.arch, self.device, self._rows_at_once)

    def load_ending(self) -> Callable[[Float[Tensor, "*M D"]], Float[Tensor, "*M N"]]:
        """Loads final norm and head, and returns the function from the last residual stream to float32 logits."""
        arch = self.arch
        norm = StackNorm(arch.norm, arch.hidden_size)
        read = {name: self.pieces.read(f"norm.{name}", None, torch.float32) for name in norm.state_dict()}
        norm.load_state_dict(read, assign=True)
        norm.requires_grad_(False).to(self.device)
        weight = self.pieces.read(EMBEDDING if arch.tied_head else "lm_head.weight", None, torch.float32)
        head = Head(weight.to(self.device), softcap=arch.logit_softcap)
        return lambda states: head.logits(norm(states.to(self.device))).to(states.device)

    def walk(
        self, sequences: PackedSequence, num_layers: int | None = None, watch: Watch | None = None
    ) -> Iterator[tuple[SourceLayer, Float[Tensor, "B T D"]]]:
        """Yields each layer with the residual stream before it, first to last.

        Args:
            sequences: Packed tokens, a batch.
            num_layers: Number of layers to yield; None: all.
            watch: Called with the inputs of every linear of a layer when the next layer is asked for.
        """
        hidden_states = self.embed(sequences.input_ids)
        last = (self.arch.num_layers if num_layers is None else num_layers) - 1
        for index in range(last + 1):
            layer = self.load(index)
            yield layer, hidden_states
            if index < last or watch is not None:
                hidden_states = layer.run(hidden_states, sequences.position_ids, watch)


def _lone_layer(arch: ArchSpec, index: int, pools: Sequence[Pool]) -> Blueprint:
    alone = identity_blueprint(arch.model_copy(update={"layers": (arch.layers[index],), "vocab_size": 1}))
    gone = [pool for pool in POOLS if pool not in pools]
    depth = alone.depths[0].model_copy(update=dict.fromkeys(gone))
    return alone.model_copy(update={**{f"{pool}s": () for pool in gone}, "depths": (depth,)})
