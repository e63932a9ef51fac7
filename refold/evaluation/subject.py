"""A model under evaluation, with its tokenizer and what is written down about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refold.checkpoint.companions import has_tokenizer
from refold.checkpoint.locate import Source
from refold.checkpoint.provenance import describe_source
from refold.errors import RefoldError, SourceError
from refold.evaluation.result import ModelFacts
from refold.modeling.load import ModelLike, load_model, load_tokenizer, open_source, stored_dtype


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        model: On its device, in the mode it was given in.
        tokenizer: None where the folder has none or the model came without.
        facts: What the result says of it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    facts: ModelFacts


def open_subject(
    model: ModelLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Subject:
    """Loads a model with its tokenizer, or takes a loaded one as it is.

    Args:
        model: Folder, hub id, located source, or a loaded model.
        tokenizer: Instead of the folder's own.
        dtype: Of the weights; None: as stored, or float32 where that is slow, see `load_model`.
        device: None: the best there is.

    Raises:
        RefoldError: `dtype` or `device` is given for a loaded model.
        SourceError: The folder is missing or broken.
        FolderError: It is torn.
    """
    if isinstance(model, PreTrainedModel):
        for name, value in (("dtype", dtype), ("device", device)):
            if value is not None:
                raise RefoldError(
                    f"{name}: only a model loaded from a folder can be given one (got {value} for a loaded model); "
                    f"call model.to({name}=...) before"
                )
        return Subject(model, tokenizer, _facts(model, str(model.config._name_or_path or type(model).__name__), None))
    located, folder = open_source(model)
    if tokenizer is None and has_tokenizer([path.name for path in folder.iterdir()]):
        tokenizer = load_tokenizer(located)
    loaded = load_model(located, dtype=dtype, device=device)
    return Subject(loaded, tokenizer, _facts(loaded, located.hub_id or str(located.where), located))


def require_tokenizer(subject: Subject) -> PreTrainedTokenizerBase:
    """Returns the tokenizer.

    Raises:
        SourceError: There is none.
    """
    if subject.tokenizer is None:
        raise SourceError(
            f"{subject.facts.name}: a tokenizer is required (none there); copy its files into the folder, or give "
            f"`tokenizer`"
        )
    return subject.tokenizer


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model into evaluation mode, and back into training afterwards if that is where it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _facts(model: PreTrainedModel, name: str, located: Source | None) -> ModelFacts:
    parameters = list(model.parameters())
    stored = stored_dtype(model)
    return ModelFacts(
        name=name,
        model_type=model.config.model_type,
        parameters=sum(each.numel() for each in parameters),
        weight_bytes=sum(each.numel() * min(each.element_size(), stored.itemsize) for each in parameters),
        dtype=str(stored).removeprefix("torch."),
        computed_in=str(model.dtype).removeprefix("torch."),
        source={} if located is None else describe_source(located),
    )
