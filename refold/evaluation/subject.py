"""A model under evaluation, with its tokenizer and what is written down about it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refold.checkpoint.companions import has_tokenizer
from refold.checkpoint.locate import Source
from refold.checkpoint.provenance import describe_source
from refold.errors import RefoldError, SourceError
from refold.evaluation.result import ModelFacts
from refold.modeling.load import load_model, load_tokenizer, open_source, stored_dtype
from refold.scoring.predict import head_of

ModelLike = str | Path | Source | PreTrainedModel


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


def check_comparable(subject: Subject, against: Subject) -> None:
    """Refuses a pair of models whose tokens mean different texts, or that cannot be compared where they lie.

    Raises:
        SourceError: The vocabularies differ.
        RefoldError: The devices do.
    """
    devices = [str(each.model.device) for each in (subject, against)]
    if devices[0] != devices[1]:
        raise RefoldError(f"against: both models on one device are required (got {devices[0]} and {devices[1]})")
    sizes = [head_of(each.model).vocab_size for each in (subject, against)]
    vocabularies = [each.tokenizer.get_vocab() for each in (subject, against) if each.tokenizer is not None]
    got = f"{sizes[0]} and {sizes[1]} tokens"
    if sizes[0] == sizes[1]:
        if len(vocabularies) < 2 or vocabularies[0] == vocabularies[1]:
            return
        num_different = len(vocabularies[0].items() ^ vocabularies[1].items())
        got = f"{num_different} entries that only one has"
    raise SourceError(
        f"against: the vocabulary of {subject.facts.name} is required (got {got}); compare models that share a "
        f"tokenizer"
    )


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
