"""Gemma 3 with vision: refold reads its text part, a `gemma3_text` model, and exports that family."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from refold.families import gemma3_text
from refold.families.arch import ArchSpec, Family, TensorRule

# Released configs hold only the fields that differ from these.
TEXT_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}


def read_config(config: Mapping[str, Any]) -> ArchSpec:
    text = {**TEXT_DEFAULTS, **(config.get("text_config") or {})}
    if config.get("tie_word_embeddings") is not None:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    return gemma3_text.read_config(text)


def _rules(stack: str, head: str) -> tuple[TensorRule, ...]:
    """Returns the rules of the text model with other names for stack and head."""
    return tuple(
        replace(rule, source=rule.source.replace("model.", stack, 1).replace("lm_head.", head, 1))
        for rule in gemma3_text.FAMILY.rules
    )


NO_TEXT = "refold uses only the text part"

FAMILY = Family(
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    url="https://arxiv.org/abs/2503.19786",
    read_config=read_config,
    write_config=gemma3_text.write_config,
    rules=_rules("model.language_model.", "lm_head."),
    spellings=(_rules("language_model.model.", "language_model.lm_head."),),
    ignored={
        f"{prefix}{part}.*": NO_TEXT for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
    },
)
