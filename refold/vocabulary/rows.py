"""The rows of embedding and head that belong to kept tokens."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refold.errors import SourceError
from refold.scoring.head import Head
from refold.sources.pieces import PieceReader
from refold.vocabulary.kept_tokens import KeptTokens

TABLES = ("embed_tokens.weight", "lm_head.weight")
"""Canonical tensors with one row for each token."""


class KeptPieces(PieceReader):
    """Reader of a source whose embedding and head have only the rows of kept tokens.

    Args:
        pieces: Reader of the source.
        kept: The kept tokens.
    """

    def __init__(self, pieces: PieceReader, kept: KeptTokens):
        super().__init__(pieces.model, pieces.reader)
        self._pieces, self._ids = pieces, torch.from_numpy(kept.ids)

    def read(self, canonical: str, layer: int | None, dtype: torch.dtype, repeat: int = 1) -> Tensor:
        found = self._pieces.read(canonical, layer, dtype, repeat)
        return found.index_select(0, self._ids) if canonical in TABLES else found


def cut_head(head: Head, kept: KeptTokens) -> Head:
    """Returns a head over the kept tokens, whose probabilities are those of the whole head, renormalised."""
    ids = torch.from_numpy(kept.ids).to(head.weight.device)
    bias = None if head.bias is None else head.bias[ids]
    lora = None if head.lora is None else (head.lora[0], head.lora[1][ids])
    return Head(head.weight[ids], bias, head.scale, head.softcap, lora)


def cut_model(model: PreTrainedModel, kept: KeptTokens) -> PreTrainedModel:
    """Cuts embedding and head of a loaded model, in place, to the kept tokens.

    The model then reads and predicts the tokens of the cut vocabulary. Its probabilities are those of the whole model,
    renormalised over the kept tokens.

    Raises:
        SourceError: The model has another number of rows than the vocabulary that the tokens were kept of.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    for table in (embedding, head):
        if not isinstance(table, nn.Embedding | nn.Linear) or table.weight.shape[0] != kept.source_size:
            got = getattr(getattr(table, "weight", None), "shape", [type(table).__name__])[0]
            raise SourceError(
                f"vocabulary: a model with a vocabulary of {kept.source_size:,} tokens is required (got {got}); give "
                f"the source of the kept tokens"
            )
    ids = torch.from_numpy(kept.ids).to(embedding.weight.device)
    is_tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight.detach()[ids], requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings, embedding.padding_idx = kept.size, None
    if is_tied:
        head.weight = embedding.weight
    else:
        head.weight = nn.Parameter(head.weight.detach()[ids], requires_grad=head.weight.requires_grad)
    if getattr(head, "bias", None) is not None:
        head.bias = nn.Parameter(head.bias.detach()[ids], requires_grad=head.bias.requires_grad)
    head.out_features = kept.size
    model.config.vocab_size = kept.size
    return model
