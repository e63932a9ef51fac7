"""Hidden states and head of any causal language model, the inputs of scores and losses."""

from typing import Any, NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from refold.scoring.head import Head, Predictions


class ExitPredictions(NamedTuple):
    """Predictions of an early exit.

    Attributes:
        depths: Number of depths that run.
        predictions: Predictions by the norm and the head of the exit.
        gate: Logits of the gate of the exit, or None.
    """

    depths: int
    predictions: Predictions
    gate: Float[Tensor, "B T"] | None


def head_of(model: PreTrainedModel, depths: int | None = None) -> Head:
    """Returns the head of a model, with the soft-cap of its config.

    Args:
        model: A folded model or a source, as transformers loads it.
        depths: Number of depths after which a folded model exits, with the LoRA of that exit; None: all depths.
    """
    linear: Any = model.get_output_embeddings()
    softcap = getattr(model, "logit_softcap", None)
    if softcap is None:
        softcap = getattr(model.config, "final_logit_softcapping", None)
    lora = None
    if depths is not None:
        stack: Any = model.base_model
        parts = stack.exit_parts(depths - 1)
        lora = None if parts is None or parts.lora is None else parts.lora.pair
    return Head(linear.weight, getattr(linear, "bias", None), softcap=softcap, lora=lora)


def predict(
    model: PreTrainedModel,
    input_ids: Int64[Tensor, "B T"],
    *,
    position_ids: Int64[Tensor, "B T"] | None = None,
    attention_mask: Tensor | None = None,
) -> Predictions:
    """Runs the stack without cache and without logits, and returns its predictions.

    Args:
        model: A folded model or a source, as transformers loads it.
        input_ids: Tokens.
        position_ids: Positions. A position other than the previous one plus 1 begins a new document.
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
    """Runs the stack of a folded model once and returns its predictions at full depth and at each exit.

    The arguments are those of `predict`.
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
    """Returns the predictions of a folded model at each exit, in the order of depths.

    Args:
        model: The model.
        output: Output of its stack with `output_exits`.
    """
    stack: Any = model.base_model
    hidden = output.exit_hidden_states
    gates = output.exit_gates or (None,) * len(hidden)
    found = zip(stack.exit_depths, hidden, gates, strict=False)
    return [
        ExitPredictions(index + 1, Predictions(states, head_of(model, index + 1)), gate)
        for index, states, gate in found
    ]
