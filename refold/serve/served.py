"""A model under one name: its engine, its tokenizer, and the adapters it runs with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from refold.serve.link import EngineLink

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["model", "adapters", "source"]


@dataclass(frozen=True)
class ServedModel:
    """One name that requests may ask for.

    Attributes:
        name: A label; never a path.
        link: Its engine; adapters of one block share one.
        tokenizer: Its tokenizer; None: prompts must be token ids.
        adapter: Name of the adapters in the engine; None: the model's own.
        role: `source` is the model that the others are compared with.
    """

    name: str
    link: EngineLink
    tokenizer: "PreTrainedTokenizerBase | None"
    adapter: str | None = None
    role: Role = "model"
