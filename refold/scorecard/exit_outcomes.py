"""Outcomes of every exit and of the full depth at every token of some documents."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from refold.data.tokens import TokenisedDocuments
from refold.engine.confidence import confidence, reads_gate
from refold.engine.exit_table import Documents, ExitTable, TableBatch, document_batches
from refold.evaluation.subject import evaluating
from refold.modeling.model import RefoldForCausalLM
from refold.progress import Report
from refold.scoring.head import CHUNK_BYTES, Predictions, chunks
from refold.scoring.predict import ExitPredictions, predict_exits


@dataclass(frozen=True)
class ExitOutcomes:
    """Outcomes at M scored tokens, with keys and values of the full depth; the last of E + 1 rows is the full depth.

    Attributes:
        depths: Depths that run for each row.
        nll: Negative log-likelihood of the next token, nats.
        is_right: Whether the likeliest token is the next token.
        best: The likeliest token.
        confidences: By measure, the confidence of each exit, `[E, M]`.
        documents: Number of the document of each token.
        num_documents: Number of documents.
    """

    depths: tuple[int, ...]
    nll: Float[np.ndarray, "rows M"]
    is_right: Bool[np.ndarray, "rows M"]
    best: Int64[np.ndarray, "rows M"]
    confidences: dict[str, Float[np.ndarray, "E M"]]
    documents: Int64[np.ndarray, "M"]
    num_documents: int

    def table(self, measure: str, documents: Sequence[int]) -> ExitTable:
        """Returns confidences and errors at the tokens of some documents, which get new numbers.

        Args:
            measure: One of the measures of `confidences`.
            documents: Which documents.
        """
        chosen = np.isin(self.documents, documents)
        numbers = np.searchsorted(np.array(documents), self.documents[chosen])
        best = self.best[:, chosen]
        return ExitTable(
            self.depths[:-1],
            self.confidences[measure][:, chosen],
            best[:-1] != best[-1],
            best[-1],
            numbers,
            len(documents),
        )


@torch.inference_mode()
def run_exits(
    model: RefoldForCausalLM, text: TokenisedDocuments, measures: Sequence[str], report: Report
) -> ExitOutcomes:
    """Runs a model over documents, all exits at once.

    Args:
        model: A model with exits.
        text: Documents of at least two tokens.
        measures: Measures of confidence to compute.
        report: Told the number of documents.
    """
    documents: Documents = [text.document(index).astype(np.int64) for index in range(text.num_documents)]
    # The last token of a document predicts nothing that is known.
    inputs = [ids[:-1] for ids in documents]
    parts: list[_Part] = []
    numbers: list[np.ndarray] = []
    done = 0
    with evaluating(model):
        for batch in document_batches(inputs):
            labels = np.concatenate([documents[index][1:] for index in batch.documents])
            parts.append(_run(model, batch, torch.from_numpy(labels), measures))
            lengths = batch.is_token.sum(-1).numpy()
            numbers.append(np.repeat(np.array(batch.documents, dtype=np.int64), lengths))
            done += len(batch.documents)
            report(done, len(documents))
    nll, is_right, best = (
        torch.cat([getattr(part, name) for part in parts], -1).cpu().numpy() for name in ("nll", "is_right", "best")
    )
    sure = {name: torch.cat([part.confidences[name] for part in parts], -1).cpu().numpy() for name in measures}
    depths = (*(index + 1 for index in model.model.exit_depths), len(model.model.depths))
    return ExitOutcomes(depths, nll, is_right, best, sure, np.concatenate(numbers), len(documents))


@dataclass(frozen=True)
class _Part:
    """Outcomes of a batch, as in `ExitOutcomes`."""

    nll: Tensor
    is_right: Tensor
    best: Tensor
    confidences: dict[str, Tensor]


def _run(model: RefoldForCausalLM, batch: TableBatch, labels: Tensor, measures: Sequence[str]) -> _Part:
    device = model.device
    final, exits = predict_exits(model, batch.input_ids.to(device))
    index = batch.is_token.reshape(-1).nonzero().squeeze(-1).to(device)
    labels = labels.to(device)
    rows = [*exits, ExitPredictions(len(model.model.depths), final, None)]
    flat = [each.predictions.flat(index) for each in rows]
    gates = [None if each.gate is None else each.gate.reshape(-1)[index] for each in rows]
    pieces: list[_Part] = []
    for some in chunks(len(index), final.head.vocab_size, len(rows), CHUNK_BYTES):
        pieces.append(_judge(flat, gates, labels[some], some, measures))
    return _Part(
        torch.cat([piece.nll for piece in pieces], -1),
        torch.cat([piece.is_right for piece in pieces], -1),
        torch.cat([piece.best for piece in pieces], -1),
        {name: torch.cat([piece.confidences[name] for piece in pieces], -1) for name in measures},
    )


def _judge(
    rows: Sequence[Predictions], gates: Sequence[Tensor | None], labels: Tensor, some: slice, measures: Sequence[str]
) -> _Part:
    """Judges some positions; the last row is the full depth."""
    nll, best = [], []
    sure: dict[str, list[Tensor]] = {name: [] for name in measures}
    previous: Tensor | None = None
    for row, gate in zip(rows, gates, strict=True):
        logits = row.head.logits(row.hidden[some]).float()
        nll.append(-logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1))
        best.append(logits.argmax(-1))
        if len(nll) < len(rows):
            for name in measures:
                outputs = gate[some] if reads_gate(name) and gate is not None else logits
                sure[name].append(confidence(name, outputs, previous).float())
        previous = best[-1]
    found = torch.stack(best)
    return _Part(torch.stack(nll), found == labels, found, {name: torch.stack(each) for name, each in sure.items()})
