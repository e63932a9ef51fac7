"""A reference for a model that keeps only some tokens of the reference's vocabulary."""

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refold.data.encoder import TextEncoder
from refold.data.readers import DataSource
from refold.data.tokens import TokenisedDocuments
from refold.data.windows import window_batches
from refold.evaluation.document_sums import DocumentSums
from refold.evaluation.reference import Reference
from refold.evaluation.result import ModelFacts
from refold.evaluation.settings import WindowSizes
from refold.evaluation.subject import Subject
from refold.evaluation.text import ReadText, document_texts
from refold.scoring.agreement import token_scores
from refold.scoring.head import Head, Predictions
from refold.vocabulary.kept_tokens import KeptTokens
from refold.vocabulary.rows import cut_head


class CutReference:
    """A reference whose tokens are mapped to those of a model with a cut vocabulary.

    Agreement and KL compare the two models on the model's tokens, with the reference's probabilities renormalised over
    the kept tokens. Bits per byte of the reference are those of its own tokens and its whole head, so that tokens which
    the cut adds to a text, and probability which it no longer spends on dropped tokens, both count.

    Args:
        reference: The reference.
        kept: The tokens that the model keeps.
    """

    def __init__(self, reference: Reference, kept: KeptTokens):
        self._reference, self._kept = reference, kept
        self._head: Head | None = None

    @property
    def facts(self) -> ModelFacts:
        """Facts about the reference."""
        return self._reference.facts

    @property
    def positions(self) -> int | None:
        """Number of positions of the reference; None: no limit."""
        return self._reference.positions

    @property
    def num_kept(self) -> int:
        """Number of kept tokens."""
        return self._kept.size

    def predict(self, input_ids: Int64[Tensor, "B T"]) -> Predictions:
        """Returns the reference's predictions of kept tokens, for windows in tokens of the cut vocabulary."""
        found = self._reference.predict(self._kept.to_source(input_ids))
        if self._head is None:
            self._head = cut_head(found.head, self._kept)
        return Predictions(found.hidden, self._head)

    def let_go(self) -> None:
        """Frees the reference's model, unless the caller loaded it."""
        self._head = None
        self._reference.let_go()

    def own_sums(self, source: DataSource, text: ReadText, windows: WindowSizes) -> DocumentSums:
        """Scores the same text in the reference's own tokens, with its whole head.

        Args:
            source: The text.
            text: The text in the model's tokens; the bytes of each document are scored here too.
            windows: Context, stride and batch size.
        """
        tokenizer = self._reference.tokenizer
        assert tokenizer is not None
        own = _encode(list(document_texts(source, text)), tokenizer)
        sums, device = DocumentSums(own.num_documents), self._reference.device
        with torch.inference_mode():
            for batch in window_batches(own, **windows._asdict()):
                predictions = self._reference.predict(batch.input_ids)
                sums.add(batch.documents, batch.labels, token_scores(predictions, batch.labels.to(device)))
        return sums


def cut_reference(reference: Reference, subject: Subject) -> Reference | CutReference:
    """Returns a reference for a subject: cut to its tokens if the subject keeps some of the reference's tokens.

    Raises:
        SourceError: The vocabularies differ otherwise.
        RefoldError: The devices differ.
    """
    kept, own = subject.kept, subject.tokenizer
    known = None if reference.tokenizer is None else reference.tokenizer.get_vocab()
    is_cut = kept is not None and kept.size < kept.source_size == reference.vocab_size and own is not None
    if kept is not None and is_cut and known is not None and own is not None and kept.is_cut_of(own.get_vocab(), known):
        reference.check_device(subject)
        return CutReference(reference, kept)
    reference.check(subject)
    return reference


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> TokenisedDocuments:
    encoder = TextEncoder(tokenizer)
    encoded = encoder.encode(texts, None)
    return TokenisedDocuments(
        tokens=np.concatenate([document.ids for document in encoded]),
        offsets=np.cumsum([0, *(len(document.ids) for document in encoded)], dtype=np.int64),
        byte_offsets=np.cumsum([0, *(document.num_bytes for document in encoded)], dtype=np.int64),
        document_start=encoder.document_start,
        is_whole_source=True,
    )
