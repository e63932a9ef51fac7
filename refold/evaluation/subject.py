"""A model under evaluation, with its tokenizer and the facts about it that a result records."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refold.blueprint.cost import count_parameters, count_weight_bytes
from refold.blueprint.quantisation import holds_integers
from refold.checkpoint.companions import offers_tokenizer
from refold.checkpoint.locate import Source
from refold.checkpoint.provenance import describe_source, fitted_texts
from refold.errors import RefoldError, SourceError
from refold.evaluation.result import ModelFacts, short_hash
from refold.modeling.load import ModelLike, load_model, load_tokenizer, open_source, stored_dtype
from refold.modeling.model import RefoldForCausalLM
from refold.vocabulary.kept_tokens import KeptTokens, read_kept_tokens


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        model: The model, on its device, in training or evaluation mode.
        tokenizer: The tokenizer; None if the folder has none or the caller gave none.
        facts: Facts about the model for the result.
        kept: The tokens that the model keeps of its source's vocabulary; None: all, or a model in memory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    facts: ModelFacts
    kept: KeptTokens | None = None

    @property
    def positions(self) -> int | None:
        """Number of positions of the model; None: no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def num_embeddings(self) -> int:
        """Number of rows of the model's embedding."""
        return cast("nn.Embedding", self.model.get_input_embeddings()).num_embeddings


def open_subject(
    model: ModelLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Subject:
    """Loads a model with its tokenizer, or takes a loaded model unchanged.

    Args:
        model: Folder, hub id, located source, or a loaded model.
        tokenizer: Tokenizer; None: the folder's own.
        dtype: Dtype of the weights; None: the stored dtype, or float32 if that is slow, see `load_model`.
        device: Device of the model; None: the best one of the machine.

    Raises:
        RefoldError: `dtype` or `device` is given for a loaded model.
        SourceError: The folder is missing or broken.
        FolderError: The folder is torn.
    """
    if isinstance(model, PreTrainedModel):
        for name, value in (("dtype", dtype), ("device", device)):
            if value is not None:
                raise RefoldError(
                    f"{name}: only a model loaded from a folder can be given one (got {value} for a loaded model); "
                    f"call model.to({name}=...) before"
                )
        facts = _facts(model, str(model.config._name_or_path or type(model).__name__), None, tokenizer)
        return Subject(model, tokenizer, facts)
    located, _ = open_source(model)
    companions = located.fetch_companions()
    if tokenizer is None and offers_tokenizer(companions):
        tokenizer = load_tokenizer(located)
    loaded = load_model(located, dtype=dtype, device=device)
    facts = _facts(loaded, located.hub_id or str(located.where), located, tokenizer)
    return Subject(loaded, tokenizer, facts, read_kept_tokens(companions))


def require_tokenizer(subject: Subject) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a subject.

    Raises:
        SourceError: The subject has no tokenizer.
    """
    if subject.tokenizer is None:
        raise SourceError(
            f"{subject.facts.name}: a tokenizer is required (none there); copy its files into the folder, or give "
            f"`tokenizer`"
        )
    return subject.tokenizer


def hash_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a short hash of a tokenizer's tokens and their ids."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return short_hash(tokens.encode())


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model into evaluation mode, and restores its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _count(model: PreTrainedModel, stored: torch.dtype) -> tuple[int, int]:
    """Returns the number of parameters and their bytes as they are stored."""
    if isinstance(model, RefoldForCausalLM):
        blueprint = model.config.read_blueprint()
        if holds_integers(blueprint):
            return count_parameters(blueprint).total, count_weight_bytes(blueprint, stored.itemsize)
    parameters = list(model.parameters())
    numbers = sum(each.numel() for each in parameters)
    return numbers, sum(each.numel() * min(each.element_size(), stored.itemsize) for each in parameters)


def _facts(
    model: PreTrainedModel, name: str, located: Source | None, tokenizer: PreTrainedTokenizerBase | None
) -> ModelFacts:
    stored = stored_dtype(model)
    parameters, weight_bytes = _count(model, stored)
    return ModelFacts(
        name=name,
        model_type=model.config.model_type,
        parameters=parameters,
        weight_bytes=weight_bytes,
        dtype=str(stored).removeprefix("torch."),
        computed_in=str(model.dtype).removeprefix("torch."),
        source={} if located is None else describe_source(located),
        fitted_to=() if located is None else fitted_texts(located.fetch_companions()),
        tokenizer="" if tokenizer is None else hash_vocabulary(tokenizer),
    )
