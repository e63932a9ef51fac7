"""The stack of any blueprint: stored parts once, depths that run them, one range of depths at a time."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from refold.blueprint.schema import unused_names
from refold.errors import RefoldError
from refold.modeling.cache_name import CACHE_NAME, AnyCache, one_cache
from refold.modeling.configuration import RefoldConfig
from refold.modeling.depth import Depth, KeyValues, Parts, stack_ropes
from refold.modeling.masks import build_masks, document_starts, padding_mask, paged_masks, state_resets
from refold.modeling.outputs import StackOutput
from refold.modeling.padding import first_tokens, padding_first
from refold.modeling.pretrained import RefoldPreTrainedModel
from refold.modeling.recurrent_cache import new_cache
from refold.modeling.rows import RowRange, rows_owned, run_rows
from refold.nn.exits import ExitParts
from refold.nn.mixers.batch import Batch
from refold.nn.mixers.memory import CacheStore, count_tokens
from refold.nn.mixers.mixer import Mixer
from refold.nn.mixers.registry import MIXERS
from refold.nn.mixers.store import NOTHING_KEPT, Store
from refold.nn.mlp import Mlp
from refold.nn.norms import StackNorm
from refold.nn.part import StoredPart
from refold.nn.quantised import make_embedding
from refold.nn.rotary import Rotary

ExitAt = int | Int[Tensor, " rows"]
"""The number of depths after which rows leave the stack: one for all rows, or one for each row."""


class Ran(NamedTuple):
    """A range of depths after it has run.

    Attributes:
        hidden_states: The residual stream after the last of them.
        shared: Keys and values that later depths may read: those given, and those these depths made.
    """

    hidden_states: Float[Tensor, "B T D"]
    shared: KeyValues


class RefoldModel(RefoldPreTrainedModel):
    """Embedding, stored parts, depths, parts of exits, and final norm."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: RefoldConfig):
        super().__init__(config)
        blueprint = config.read_blueprint()
        arch, sizes = blueprint.arch, blueprint.part_arch
        self.embedding_scale = arch.embedding_scale
        self.embed_tokens = make_embedding(arch.vocab_size, arch.hidden_size, blueprint.quantised.get("embedding"))
        self.mixers = nn.ModuleList(
            MIXERS[part.mixer.type].create(sizes("mixer", index), part.mixer, blueprint.keeps_vectors("mixer", index))
            for index, part in enumerate(blueprint.mixers)
        )
        for index, mixer in enumerate(self.mixers):
            cast("StoredPart", mixer).leave_out(unused_names(blueprint, "mixer", index))
        keeps = [blueprint.keeps_vectors("mlp", index) for index in range(len(blueprint.mlps))]
        self.mlps = nn.ModuleList(Mlp(sizes("mlp", index), each) for index, each in enumerate(keeps))
        for part, module in zip((*blueprint.mixers, *blueprint.mlps), (*self.mixers, *self.mlps), strict=True):
            cast("StoredPart", module).store_as(part.factors, part.bases, part.quantised)
        self.depths = nn.ModuleList(Depth(config, blueprint, index) for index in range(blueprint.num_depths))
        # Outside the depths, because heads are read outside the stack's forward, where sharded depths hold no weights.
        self.exits = nn.ModuleDict(
            {
                str(index): ExitParts(arch, depth.exit)
                for index, depth in enumerate(blueprint.depths)
                if depth.exit is not None and depth.exit.has_parts
            }
        )
        self._exits_with_parts = frozenset(map(int, self.exits))
        self.norm = StackNorm(arch.norm, arch.hidden_size)
        mixing = [(index, depth) for index, depth in enumerate(blueprint.depths) if depth.mixer is not None]
        self.rotaries = nn.ModuleList(Rotary(rope, arch.max_position_embeddings) for rope in stack_ropes(blueprint))
        attending = [(index, depth) for index, depth in mixing if not blueprint.keeps_state(index)]
        # The first depth of each window gives caches and masks their sizes.
        self._windows = {depth.window: index for index, depth in reversed(attending)}
        self._mixes = bool(mixing)
        self._is_recurrent = len(attending) < len(mixing)
        self.keeps_states_alone = self._mixes and not attending
        self._first_counting = next((index for index, _ in (*attending, *mixing)), 0)
        self.exit_depths = tuple(index for index, depth in enumerate(blueprint.depths) if depth.exit is not None)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: AnyCache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        use_cache: bool | None = None,
        exit_depth: ExitAt | None = None,
        output_exits: bool = False,
        cache: AnyCache | None = None,
        is_packed: bool | None = None,
        **kwargs: Any,
    ) -> StackOutput:
        """Runs the stack.

        Args:
            input_ids: Tokens; or give `inputs_embeds`.
            attention_mask: `[B, past + T]` with zeros at padding, or a mask the back-end takes as it is.
            position_ids: `[B, T]`. A position that is not its predecessor plus one begins a new document, which
                sees none of the others.
            past_key_values: Cache indexed by depth; `cache` is another name of it.
            inputs_embeds: Embeddings instead of tokens.
            use_cache: Whether to keep keys and values.
            exit_depth: Run only so many depths, then the final norm, or the exit's own where an exit there has one. A
                tensor `[B]` gives each row its own number: a row's output comes from its exit, while the depths after
                it are computed for all rows up to the deepest exit.
            output_exits: Also return the normed hidden states and the gate logits of every exit of the blueprint that
                is passed.
            cache: The name that transformers has had for `past_key_values` since 5.24.
            is_packed: Whether rows hold several documents; False: every row is one, and a call of one token goes on
                with it. None: read from `position_ids` and `attention_mask`, which waits for the device. Where it is
                given, padding is required to be in the call that begins its row, if mixers keep a state.
            **kwargs: For the attention back-end.

        Raises:
            RefoldError: `exit_depth` is out of range.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is required")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if isinstance(exit_depth, Tensor):
            leaving = self.row_exits(exit_depth, len(hidden_states))
            num_depths = self.depths_to_run(max(leaving))
        else:
            leaving, num_depths = None, self.depths_to_run(exit_depth)
        if self.embedding_scale != 1.0:
            hidden_states = hidden_states * torch.tensor(self.embedding_scale, dtype=hidden_states.dtype)
        cache = one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = new_cache(self.config)
        batch = self.batch(hidden_states, attention_mask, position_ids, cache, kwargs, is_packed)
        store, shared = None if cache is None else CacheStore(cache), None
        exits: list[tuple[Tensor, Tensor | None]] = []
        left: dict[int, Tensor] = {}
        begin = 0
        for end in self._stops(num_depths, output_exits, leaving):
            hidden_states, shared = self.run(range(begin, end), hidden_states, batch, store, shared)
            begin, is_exit = end, output_exits and end - 1 in self.exit_depths
            if is_exit or end == num_depths or leaving is not None:
                left[end] = self.norm_after(end - 1)(hidden_states)
            if is_exit:
                exits.append((left[end], self._ask_gate(end - 1, left[end])))
        last = left[num_depths]
        if leaving is not None:
            last = torch.cat([left[depths][row : row + 1] for row, depths in enumerate(leaving)])
        has_gates = any(gate is not None for _, gate in exits)
        return StackOutput(
            last_hidden_state=last,
            **cast("Any", {CACHE_NAME: cache}),
            exit_hidden_states=tuple(normed for normed, _ in exits) if output_exits else None,
            exit_gates=tuple(gate for _, gate in exits) if has_gates else None,
        )

    def run(
        self,
        depths: range,
        hidden_states: Float[Tensor, "B T D"],
        batch: Batch,
        store: Store | None = None,
        shared: KeyValues | None = None,
        modules: Sequence[Depth] | None = None,
    ) -> Ran:
        """Runs a range of depths.

        Args:
            depths: Which depths, in order.
            hidden_states: The residual stream before the first of them.
            batch: From `batch`.
            store: Keeps keys and values, or states; None: nothing is kept.
            shared: Keys and values that earlier depths made and these may read.
            modules: The depths with other adapters; None: with the stack's own.
        """
        made = {} if shared is None else dict(shared)
        # Plain tuples: indexing a ModuleList costs several microseconds, a percent of a small model's decoding step.
        mixers, mlps = (cast("tuple[StoredPart, ...]", tuple(pool)) for pool in (self.mixers, self.mlps))
        modules = cast("tuple[Depth, ...]", tuple(self.depths)) if modules is None else modules
        for index in depths:
            depth = modules[index]
            spec = depth.spec
            mixer = None if spec.mixer is None else mixers[spec.mixer]
            mlp = None if spec.mlp is None else mlps[spec.mlp]
            memory = NOTHING_KEPT if store is None else store.memory(index, depth.adapters_number)
            hidden_states, states = depth.run(hidden_states, Parts(mixer, mlp), batch, memory, made)
            if states is not None:
                made[index] = states
        return Ran(hidden_states, made)

    def run_rows(
        self,
        rows: Sequence[RowRange],
        hidden_states: Float[Tensor, "B T D"],
        batch: Batch,
        store: Store | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Runs rows that stand at different depths or have different adapters, with one call of each part they share.

        Args:
            rows: Runs of neighbouring rows, in order, each with the range of depths it runs; all ranges are as long,
                and their i-th depths run the same parts with one window and one rope.
            hidden_states: The residual stream of each row before its first depth.
            batch: From `batch`.
            store: With memory for each row (`row_memory`); None: nothing is kept.

        Raises:
            RefoldError: The depths cannot run together.
        """
        return run_rows(cast("list[Depth]", list(self.depths)), self.parts_of, rows, hidden_states, batch, store)

    def fill(
        self, index: int, rows: Sequence[RowRange], hidden_states: Float[Tensor, "B T D"], batch: Batch, store: Store
    ) -> None:
        """Writes the keys and values that one depth makes of a stream, and runs nothing else of the depth.

        Args:
            index: Which depth; without a mixer, or with keys of other depths alone, it writes nothing.
            rows: Runs of neighbouring rows, in order, each with its adapters; the ranges do not matter.
            hidden_states: The residual stream in place of the one before it.
            batch: From `batch`.
            store: Keeps them.

        Raises:
            RefoldError: The depth keeps a recurrent state.
        """
        depth = cast("Depth", self.depths[index])
        if (mixer := self.parts_of(depth).mixer) is not None:
            owned, inputs = rows_owned(rows, depth), depth.inputs(batch, store.memory(index))
            cast("Mixer", mixer).fill(hidden_states, inputs, owned.adapters, owned.mixer_vectors)

    def mix(
        self, index: int, hidden_states: Float[Tensor, "B T D"], batch: Batch, shared: KeyValues | None = None
    ) -> Ran:
        """Runs the mixer of one depth alone, without a store.

        Args:
            index: Which depth.
            hidden_states: The residual stream before it.
            batch: From `batch`.
            shared: As for `run`.

        Returns:
            The update of the residual stream in place of the stream, and keys and values as `run` returns them.
        """
        depth = cast("Depth", self.depths[index])
        parts = Parts(self.parts_of(depth).mixer)
        update, states = depth.run(hidden_states, parts, batch, shared=shared, residual=False)
        return Ran(update, {**(shared or {}), **({} if states is None else {index: states})})

    def parts_of(self, depth: Depth) -> Parts:
        """Returns the mixer and the MLP that a depth runs; None where it has none."""
        spec = depth.spec
        mixer = None if spec.mixer is None else self.mixers[spec.mixer]
        mlp = None if spec.mlp is None else self.mlps[spec.mlp]
        return Parts(cast("StoredPart | None", mixer), cast("StoredPart | None", mlp))

    def row_exits(self, exit_depth: Int[Tensor, " rows"], num_rows: int) -> list[int]:
        """Returns the number of depths after which each row leaves the stack.

        Raises:
            RefoldError: Not one number for each row, or one out of range.
        """
        found = exit_depth.reshape(-1).tolist()
        if len(found) != num_rows:
            raise RefoldError(f"exit_depth: one number for each of the {num_rows} rows is required (got {len(found)})")
        return [self.depths_to_run(int(each)) for each in found]

    def _stops(self, num_depths: int, output_exits: bool, leaving: list[int] | None) -> list[int]:
        """Returns the numbers of depths after which the residual stream is read, in order."""
        stops = {num_depths, *(leaving or ())}
        if output_exits:
            stops |= {index + 1 for index in self.exit_depths if index < num_depths}
        return sorted(stops)

    def exit_parts(self, index: int) -> ExitParts | None:
        """Returns the parts of the exit after depth `index`; None if there is no exit, or if it has no parts."""
        # A plain set: a look-up in a ModuleDict costs microseconds, and every forward pass does it.
        return cast("ExitParts", self.exits[str(index)]) if index in self._exits_with_parts else None

    def norm_after(self, index: int) -> nn.Module:
        """Returns the norm that stands before the head for rows that leave after depth `index`."""
        parts = self.exit_parts(index)
        return self.norm if parts is None or parts.norm is None else parts.norm

    def _ask_gate(self, index: int, normed: Tensor) -> Tensor | None:
        parts = self.exit_parts(index)
        return None if parts is None or parts.gate is None else parts.gate(normed)

    def depths_to_run(self, exit_depth: int | None = None) -> int:
        """Returns the number of depths that a forward pass with this argument runs.

        Raises:
            RefoldError: `exit_depth` is out of range.
        """
        # num_hidden_layers may be lowered from outside: transformers' early-exit drafting does.
        available = min(len(self.depths), self.config.num_hidden_layers or len(self.depths))
        if exit_depth is None:
            return available
        if not 1 <= exit_depth <= len(self.depths):
            raise RefoldError(f"exit_depth: must lie in 1..{len(self.depths)} (got {exit_depth})")
        return min(exit_depth, available)

    def batch(
        self,
        hidden_states: Float[Tensor, "B T D"],
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        extra: dict[str, Any] | None = None,
        is_packed: bool | None = None,
    ) -> Batch:
        """Returns the inputs of a forward pass that all depths share.

        Args:
            hidden_states: Any stream of the forward pass, for its sizes, dtype and device.
            attention_mask: As for `forward`.
            position_ids: As for `forward`.
            cache: As for `forward`.
            extra: Arguments for the attention back-end.
            is_packed: As for `forward`.
        """
        if not self._mixes:
            return Batch()
        num_rows, tokens = hidden_states.shape[:2]
        if cache is not None and not isinstance(cache, Cache):
            # A paged cache: rows are several requests side by side, kept apart by the back-end's own arguments.
            return self._paged_batch(hidden_states, attention_mask, position_ids, extra or {})
        past_length = 0 if cache is None else cache.get_seq_length(self._first_counting)
        mask_2d = attention_mask if isinstance(attention_mask, Tensor) else None
        if position_ids is not None:
            position_ids = position_ids.expand(num_rows, -1)
        starts = None
        if is_packed is not False:
            starts = document_starts(position_ids, mask_2d, past_length, is_packed is None)
        if position_ids is None:
            position_ids = (torch.arange(tokens, device=hidden_states.device) + past_length).unsqueeze(0)
        resets = order = None
        if self._is_recurrent:
            if is_packed is not False or tokens > 1:
                padding, has_cache = padding_mask(attention_mask), cache is not None
                resets = state_resets(starts, padding, past_length, tokens, is_packed is None)
                order = padding_first(padding, past_length, tokens, has_cache, is_packed is None)
                if padding is not None and order is not None:
                    # A mask of this call alone does not tell whether tokens came before.
                    begins = first_tokens(padding, tokens) & (padding.shape[1] > tokens or past_length == 0)
                    resets = (begins if resets is None else resets | begins).gather(1, order)
            if not self._windows:
                count_tokens(cache, self._first_counting, hidden_states)
        reads_mask = is_packed is None
        masks = build_masks(
            self.config, self._windows, hidden_states, attention_mask, cache, past_length, starts, reads_mask
        )
        return Batch(
            rotations=tuple(rotary(position_ids, hidden_states.dtype) for rotary in self.rotaries),
            masks=masks,
            document_starts=starts,
            resets=resets,
            order=order,
            extra={"position_ids": position_ids, **(extra or {})},
        )

    def _paged_batch(
        self, hidden_states: Tensor, attention_mask: Any, position_ids: Tensor | None, extra: dict[str, Any]
    ) -> Batch:
        if position_ids is None:
            raise RefoldError("position_ids: are required with a paged cache (got none); give those of every token")
        return Batch(
            rotations=tuple(rotary(position_ids, hidden_states.dtype) for rotary in self.rotaries),
            masks=paged_masks(attention_mask, self._windows),
            extra={"position_ids": position_ids, **extra},
        )
