"""The language model of any blueprint: the stack, the head, and the hooks that `generate` calls."""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.generation import GenerationMixin, MaxLengthCriteria, StoppingCriteriaList
from transformers.utils.generic import can_return_tuple

from refold.blueprint.integers import Scheme, find_scheme
from refold.modeling.cache_name import CACHE_NAME, AnyCache, one_cache
from refold.modeling.configuration import RefoldConfig
from refold.modeling.masks import holds_documents
from refold.modeling.outputs import CausalOutput, StackOutput
from refold.modeling.paging import require_pages
from refold.modeling.pretrained import RefoldPreTrainedModel
from refold.modeling.recurrent_cache import prepare_generation_cache
from refold.modeling.stack import ExitAt, RefoldModel
from refold.nn.quantised import QuantisedLinear


def _tied_integers(scheme: Scheme, shape: tuple[int, int]) -> dict[str, str]:
    """Returns the names of a head's integers with those of the embedding, whose memory they are."""
    suffixes = [piece.suffix for piece in scheme.pieces(*shape)]
    return {f"lm_head.weight{suffix}": f"model.embed_tokens.weight{suffix}" for suffix in suffixes}


class RefoldForCausalLM(RefoldPreTrainedModel, GenerationMixin):
    """A folded language model: works wherever a transformers causal model does."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RefoldConfig):
        super().__init__(config)
        self.model = RefoldModel(config)
        self.vocab_size = config.vocab_size
        self.logit_softcap = config.read_blueprint().arch.logit_softcap
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        stored = config.read_blueprint().quantised
        name = stored.get("embedding" if config.tie_word_embeddings else "head")
        if name is not None:
            self.lm_head = QuantisedLinear(self.lm_head, find_scheme(name))
            if config.tie_word_embeddings:
                self._tied_weights_keys = _tied_integers(find_scheme(name), self.lm_head.shape)
        self.post_init()

    def project_logits(
        self, hidden_states: Float[Tensor, "*batch D"], depth: int | None = None
    ) -> Float[Tensor, "*batch N"]:
        """Returns the logits of normed hidden states, from the head and its soft-cap.

        Args:
            hidden_states: After the norm that belongs to the depth.
            depth: The depth they come from, whose exit may have a LoRA on the head; None: the last.
        """
        logits = self.lm_head(hidden_states)
        parts = None if depth is None else self.model.exit_parts(depth)
        if parts is not None and parts.lora is not None:
            logits = parts.lora.adapt(logits, hidden_states)
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits

    def logits_after(self, num_depths: int, hidden_states: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch N"]:
        """Returns the logits of a residual stream that leaves the stack after so many depths."""
        return self.project_logits(self.model.norm_after(num_depths - 1)(hidden_states), num_depths - 1)

    def _project_rows(self, hidden_states: Tensor, exit_depth: ExitAt | None) -> Tensor:
        """Returns the logits of each row, from the head of the exit at which the row left the stack."""
        if not isinstance(exit_depth, Tensor):
            return self.project_logits(hidden_states, self.model.depths_to_run(exit_depth) - 1)
        leaving = self.model.row_exits(exit_depth, len(hidden_states))
        rows = [self.project_logits(hidden_states[row : row + 1], at - 1) for row, at in enumerate(leaving)]
        return torch.cat(rows)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        # The source's context length does not limit recurrent states, so transformers need not warn about it.
        criteria = super()._get_stopping_criteria(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        for each in criteria:
            if isinstance(each, MaxLengthCriteria) and self.model.keeps_states_alone:
                each.max_position_embeddings = None
        return criteria

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = model_kwargs.get(CACHE_NAME)
        made = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if given is None:
            prepare_generation_cache(model_kwargs, self.config)
        return made

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if "is_packed" not in updated:
            # Decided once, after the prompt: a check at every token would wait for the device.
            updated["is_packed"] = holds_documents(
                updated.get("position_ids"), updated.get("attention_mask"), updated.get(CACHE_NAME)
            )
        return updated

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the manager of transformers' continuous batching.

        Raises:
            RefoldError: The stack has a depth that its paged cache has no place for.
        """
        require_pages(self.config)
        return super().init_continuous_batching(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: AnyCache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        exit_depth: ExitAt | None = None,
        output_exits: bool = False,
        cache: AnyCache | None = None,
        is_packed: bool | None = None,
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
            is_packed=is_packed,
            **kwargs,
        )
        assert stack.last_hidden_state is not None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._project_rows(stack.last_hidden_state[:, kept], exit_depth)
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
