"""The model of any blueprint: stored parts once, depths that run them."""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, MaxLengthCriteria, StoppingCriteriaList
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from refold.blueprint.contents import unused_names
from refold.blueprint.schema import Blueprint, DepthSpec
from refold.errors import RefoldError
from refold.modeling.cache_name import CACHE_NAME, one_cache
from refold.modeling.configuration import RefoldConfig
from refold.modeling.depth import Depth, Lent
from refold.modeling.documents import document_starts, state_resets
from refold.modeling.masks import build_masks, padding_mask
from refold.modeling.outputs import CausalOutput, StackOutput
from refold.modeling.padding import first_tokens, padding_first
from refold.modeling.pretrained import RefoldPreTrainedModel
from refold.nn.exits import ExitParts
from refold.nn.mixers.context import MixerContext
from refold.nn.mixers.memory import count_tokens
from refold.nn.mixers.registry import MIXERS
from refold.nn.mlp import Mlp
from refold.nn.norms import StackNorm
from refold.nn.part import StoredPart
from refold.nn.rotary import Rotary

Contexts = dict[tuple[int | None, int | None], MixerContext]
"""(window, index of the rope) to what mixers of that kind are given."""


class RefoldModel(RefoldPreTrainedModel):
    """Embedding, stored parts, depths, what exits have of their own, and final norm."""

    def __init__(self, config: RefoldConfig):
        super().__init__(config)
        blueprint = config.read_blueprint()
        arch = blueprint.arch
        self.embedding_scale = arch.embedding_scale
        self.embed_tokens = nn.Embedding(arch.vocab_size, arch.hidden_size)
        self.mixers = nn.ModuleList(
            MIXERS[part.mixer.type].create(arch, part.mixer, blueprint.keeps_vectors("mixer", index))
            for index, part in enumerate(blueprint.mixers)
        )
        for index, mixer in enumerate(self.mixers):
            cast("StoredPart", mixer).leave_out(unused_names(blueprint, "mixer", index))
        self.mlps = nn.ModuleList(
            Mlp(arch, blueprint.keeps_vectors("mlp", index)) for index in range(len(blueprint.mlps))
        )
        for part, module in zip((*blueprint.mixers, *blueprint.mlps), (*self.mixers, *self.mlps), strict=True):
            cast("StoredPart", module).factorise(part.factors)
            cast("StoredPart", module).share_bases(part.bases)
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
        ropes = list(dict.fromkeys(depth.rope for _, depth in mixing if depth.rope is not None))
        self.rotaries = nn.ModuleList(Rotary(rope, arch.max_position_embeddings) for rope in ropes)
        self._rope_of = {index: ropes.index(depth.rope) for index, depth in mixing if depth.rope is not None}
        recurrent = [index for index, depth in mixing if _is_recurrent(blueprint, depth)]
        attending = [(index, depth) for index, depth in mixing if index not in recurrent]
        # The first depth of each window gives caches and masks their sizes.
        self._windows = {depth.window: index for index, depth in reversed(attending)}
        self._kinds = {(depth.window, self._rope_of.get(index)) for index, depth in mixing}
        self._is_recurrent = bool(recurrent)
        self.keeps_states_alone = bool(recurrent) and not attending
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
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        use_cache: bool | None = None,
        exit_depth: int | None = None,
        output_exits: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> StackOutput:
        """Runs the stack.

        Args:
            input_ids: Tokens; or give `inputs_embeds`.
            attention_mask: `[B, past + T]` with zeros at padding, or a mask the back-end takes as it is.
            position_ids: `[B, T]`. Where they do not count on, a new document begins that sees none of the others.
            past_key_values: Cache indexed by depth; `cache` is another name of it.
            inputs_embeds: Embeddings instead of tokens.
            use_cache: Whether to keep keys and values.
            exit_depth: Run only so many depths, then the final norm, or the exit's own where an exit there has one.
            output_exits: Also return the normed hidden states, and what gates say, at every exit of the blueprint that
                is passed.
            cache: The name that transformers has had for `past_key_values` since 5.24.
            **kwargs: For the attention back-end.

        Raises:
            RefoldError: `exit_depth` is out of range.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is required")
        num_depths = self.depths_to_run(exit_depth)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embedding_scale != 1.0:
            hidden_states = hidden_states * torch.tensor(self.embedding_scale, dtype=hidden_states.dtype)
        cache = one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        contexts = self.contexts(hidden_states, attention_mask, position_ids, cache, kwargs)
        lent: Lent = {}
        exits: list[tuple[Tensor, Tensor | None]] = []
        # Plain tuples: indexing a ModuleList costs several microseconds, a percent of a small model's decoding step.
        mixers, mlps = (cast("tuple[StoredPart, ...]", tuple(pool)) for pool in (self.mixers, self.mlps))
        depths = cast("tuple[Depth, ...]", tuple(self.depths))
        for index, depth in enumerate(depths[:num_depths]):
            spec = depth.spec
            hidden_states = depth.run(
                hidden_states,
                lent,
                mixer=None if spec.mixer is None else mixers[spec.mixer],
                mlp=None if spec.mlp is None else mlps[spec.mlp],
                context=contexts.get((spec.window, self._rope_of.get(index))),
                cache=cache,
            )
            if output_exits and index in self.exit_depths:
                normed = self._norm_after(index)(hidden_states)
                exits.append((normed, self._ask_gate(index, normed)))
        has_gates = any(gate is not None for _, gate in exits)
        return StackOutput(
            last_hidden_state=self._norm_after(num_depths - 1)(hidden_states),
            **cast("Any", {CACHE_NAME: cache}),
            exit_hidden_states=tuple(normed for normed, _ in exits) if output_exits else None,
            exit_gates=tuple(gate for _, gate in exits) if has_gates else None,
        )

    def exit_parts(self, index: int) -> ExitParts | None:
        """Returns what the exit after depth `index` has of its own; None for nothing, or where there is no exit."""
        # A plain set: asking a ModuleDict costs microseconds, and every forward pass asks.
        return cast("ExitParts", self.exits[str(index)]) if index in self._exits_with_parts else None

    def _norm_after(self, index: int) -> nn.Module:
        parts = self.exit_parts(index)
        return self.norm if parts is None or parts.norm is None else parts.norm

    def _ask_gate(self, index: int, normed: Tensor) -> Tensor | None:
        parts = self.exit_parts(index)
        return None if parts is None or parts.gate is None else parts.gate(normed)

    def depths_to_run(self, exit_depth: int | None = None) -> int:
        """Returns how many depths a forward pass with this argument runs.

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

    def run_depth(
        self,
        index: int,
        hidden_states: Float[Tensor, "B T D"],
        contexts: Contexts,
        mixer_only: bool = False,
        lent: Lent | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Runs one depth by itself, without a cache.

        Args:
            index: Which depth.
            hidden_states: The stream before it.
            contexts: From `contexts`.
            mixer_only: Return what its mixer adds to the stream instead of the stream after the depth.
            lent: Keys and values that depths left which were run before and it may read; its own are added.
        """
        depth = cast("Depth", self.depths[index])
        spec = depth.spec
        return depth.run(
            hidden_states,
            {} if lent is None else lent,
            mixer=None if spec.mixer is None else self.mixers[spec.mixer],
            mlp=None if spec.mlp is None or mixer_only else self.mlps[spec.mlp],
            context=contexts.get((spec.window, self._rope_of.get(index))),
            residual=not mixer_only,
        )

    def contexts(
        self,
        hidden_states: Float[Tensor, "B T D"],
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Contexts:
        """Returns what mixers need besides the stream, once for each pair of window and rope that occurs.

        Args:
            hidden_states: Any stream of the forward pass, for its sizes, dtype and device.
            attention_mask: As for `forward`.
            position_ids: As for `forward`.
            cache: As for `forward`.
            extra: Arguments for the attention back-end.
        """
        if not self._kinds:
            return {}
        batch, tokens = hidden_states.shape[:2]
        past_length = 0 if cache is None else cache.get_seq_length(self._first_counting)
        mask_2d = attention_mask if isinstance(attention_mask, Tensor) else None
        if position_ids is not None:
            position_ids = position_ids.expand(batch, -1)
        starts = document_starts(position_ids, mask_2d, past_length)
        if position_ids is None:
            position_ids = (torch.arange(tokens, device=hidden_states.device) + past_length).unsqueeze(0)
        resets = order = None
        if self._is_recurrent:
            padding = padding_mask(attention_mask)
            resets = state_resets(starts, padding, past_length, tokens)
            order = padding_first(padding, past_length, tokens, has_cache=cache is not None)
            if padding is not None and order is not None:
                begins = first_tokens(padding, tokens)
                resets = (begins if resets is None else resets | begins).gather(1, order)
            if not self._windows:
                count_tokens(cache, self._first_counting, hidden_states)
        masks = build_masks(self.config, self._windows, hidden_states, attention_mask, cache, past_length, starts)
        rotations = [rotary(position_ids, hidden_states.dtype) for rotary in self.rotaries]
        extra = {"position_ids": position_ids, **(extra or {})}
        return {
            (window, rope): MixerContext(
                None if rope is None else rotations[rope], masks.get(window), starts, resets, cache, extra, order=order
            )
            for window, rope in self._kinds
        }


def _is_recurrent(blueprint: Blueprint, depth: DepthSpec) -> bool:
    return depth.mixer is not None and blueprint.mixers[depth.mixer].mixer.is_recurrent


class RefoldForCausalLM(RefoldPreTrainedModel, GenerationMixin):
    """A folded language model: works wherever a transformers causal model does."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RefoldConfig):
        super().__init__(config)
        self.model = RefoldModel(config)
        self.vocab_size = config.vocab_size
        self.logit_softcap = config.read_blueprint().arch.logit_softcap
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def project_logits(
        self, hidden_states: Float[Tensor, "*batch D"], depth: int | None = None
    ) -> Float[Tensor, "*batch N"]:
        """Puts normed hidden states through the head and its soft-cap.

        Args:
            hidden_states: After the norm that belongs to the depth.
            depth: The depth they come from, whose exit may have a LoRA on the head; None: the last.
        """
        logits = self.lm_head(hidden_states)
        parts = None if depth is None else self.model.exit_parts(depth)
        if parts is not None and parts.head_lora is not None:
            logits = parts.head_lora(logits, hidden_states)
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        # The source's context is no limit for states, so nobody is reminded of it.
        criteria = super()._get_stopping_criteria(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        for each in criteria:
            if isinstance(each, MaxLengthCriteria) and self.model.keeps_states_alone:
                each.max_position_embeddings = None
        return criteria

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        exit_depth: int | None = None,
        output_exits: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalOutput:
        """Runs stack and head; arguments as for `RefoldModel.forward`, and:

        Args:
            labels: Targets in transformers' convention (shifted inside, -100 ignored); adds `loss`.
            logits_to_keep: Only so many last positions get logits (0: all), or the positions themselves.
            **kwargs: Arguments of the attention back-end and of the loss function, such as `shift_labels` (targets that
                are shifted already), `num_items_in_batch` and `ignore_index`.
        """
        stack: StackOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            exit_depth=exit_depth,
            output_exits=output_exits,
            **kwargs,
        )
        assert stack.last_hidden_state is not None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last = self.model.depths_to_run(exit_depth) - 1
        logits = self.project_logits(stack.last_hidden_state[:, kept], last)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        exit_logits = None
        if stack.exit_hidden_states is not None:
            places = zip(self.model.exit_depths, stack.exit_hidden_states, strict=False)
            exit_logits = tuple(self.project_logits(states[:, kept], depth) for depth, states in places)
        exit_gates = None
        if stack.exit_gates is not None:
            exit_gates = tuple(None if gate is None else gate[:, kept] for gate in stack.exit_gates)
        return CausalOutput(
            loss=loss,
            logits=logits,
            **cast("Any", {CACHE_NAME: getattr(stack, CACHE_NAME)}),
            hidden_states=stack.hidden_states,
            attentions=stack.attentions,
            exit_logits=exit_logits,
            exit_gates=exit_gates,
        )
