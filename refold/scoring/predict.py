"""Hidden states and head of any causal language model: all that scores and losses need of one."""

from typing import Any

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from refold.scoring.head import Head, Predictions


def head_of(model: PreTrainedModel) -> Head:
    """Returns what turns the model's last hidden states into logits, with the soft-cap its config names."""
    linear: Any = model.get_output_embeddings()
    softcap = getattr(model, "logit_softcap", None)
    if softcap is None:
        softcap = getattr(model.config, "final_logit_softcapping", None)
    return Head(linear.weight, getattr(linear, "bias", None), softcap=softcap)


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
