"""Hidden states and head of any causal language model: all that scores and losses need of one."""

from typing import Any, NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from refold.scoring.head import Head, Predictions


class ExitPredictions(NamedTuple):
    """What a stack that is left early predicts.

    Attributes:
        depths: how many depths run.
        predictions: through the exit's norm and head.
        gate: logits of the exit's gate, None where it has none.
    """

    depths: int
    predictions: Predictions
    gate: Float[Tensor, "B T"] | None


def head_of(model: PreTrainedModel, depths: int | None = None) -> Head:
    """Returns what turns the model's last hidden states into logits, with the soft-cap its config names.

    Args:
        model: A folded model or a source, as transformers loads it.
        depths: Of a folded model the head it has after so many depths, where an exit may have a LoRA; None: after all.
    """
    linear: Any = model.get_output_embeddings()
    softcap = getattr(model, "logit_softcap", None)
    if softcap is None:
        softcap = getattr(model.config, "final_logit_softcapping", None)
    lora = None
    if depths is not None:
        stack: Any = model.base_model
        parts = stack.exit_parts(depths - 1)
        lora = None if parts is None or parts.head_lora is None else parts.head_lora()
    return Head(linear.weight, getattr(linear, "bias", None), softcap=softcap, lora=lora)


def predict(
    model: PreTrainedModel,
    input_ids: Int64[Tensor, "B T"],
    *,
    position_ids: Int64[Tensor, "B T"] | None = None,
    attention_mask: Tensor | None = None,
) -> Predictions:
    """Runs the stack without cache and without logits.

    Args:
        model: A folded model or a source, as transformers loads it.
        input_ids: Tokens.
        position_ids: Where they fall back, a new document begins that sees none of the others.
        attention_mask: Zeros at padding.
    """
    stack: Any = model.base_model
    output = stack(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False)
    return Predictions(output.last_hidden_state, head_of(model))


def predict_exits(
    model: PreTrainedModel,
    input_ids: Int64[Tensor, "B T"],
    *,
    position_ids: Int64[Tensor, "B T"] | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[Predictions, list[ExitPredictions]]:
    """Runs the stack of a folded model once and returns what it predicts at full depth, and at each of its exits.

    Arguments as for `predict`.
    """
    stack: Any = model.base_model
    output = stack(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        use_cache=False,
        output_exits=True,
    )
    return Predictions(output.last_hidden_state, head_of(model)), read_exits(model, output)


def read_exits(model: PreTrainedModel, output: Any) -> list[ExitPredictions]:
    """Returns what a folded model predicts at each exit, top to bottom.

    Args:
        model: The model.
        output: Of its stack, run with `output_exits`.
    """
    stack: Any = model.base_model
    hidden = output.exit_hidden_states
    gates = output.exit_gates or (None,) * len(hidden)
    found = zip(stack.exit_depths, hidden, gates, strict=False)
    return [
        ExitPredictions(index + 1, Predictions(states, head_of(model, index + 1)), gate)
        for index, states, gate in found
    ]
