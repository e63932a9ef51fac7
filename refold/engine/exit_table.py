"""Confidence and errors of every exit at every token of many documents."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from refold.engine.confidence import confidence, reads_gate
from refold.engine.risk import DocumentLosses
from refold.evaluation.subject import evaluating
from refold.modeling.model import RefoldForCausalLM
from refold.scoring.head import CHUNK_BYTES, chunks
from refold.scoring.predict import ExitPredictions, head_of, predict_exits

Documents = Sequence[Int64[np.ndarray, "_"]]
"""Token ids of each document."""
DocumentProgress = Callable[[int, int], None]
"""Called with the number of documents done and of all documents."""
BATCH_TOKENS = 4096
"""Tokens of a batch of documents."""


class TableBatch(NamedTuple):
    """Some documents, padded on the right, where causal models never read the padding.

    Attributes:
        input_ids: Token ids, 0 at padding.
        is_token: False at padding.
        documents: Number of the document of each row.
    """

    input_ids: Int64[Tensor, "B T"]
    is_token: Bool[Tensor, "B T"]
    documents: tuple[int, ...]


@dataclass(frozen=True)
class ExitTable:
    """Confidences and errors, with the full depth as the reference. Tokens are in the order of `document_batches`.

    Attributes:
        depths: Number of depths before each exit.
        confidences: Of each exit at each token.
        differs: Whether the likeliest token at the exit is another one than at full depth.
        full: Likeliest token at full depth.
        documents: Number of the document of each token.
        num_documents: Number of documents, each of which has tokens.
    """

    depths: tuple[int, ...]
    confidences: Float[np.ndarray, "E M"]
    differs: Bool[np.ndarray, "E M"]
    full: Int64[np.ndarray, "M"]
    documents: Int64[np.ndarray, "M"]
    num_documents: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.full)

    def by_document(self, values: Bool[np.ndarray, "M"]) -> DocumentLosses:
        """Returns the share of tokens of each document for which `values` is true."""
        sizes = np.bincount(self.documents, minlength=self.num_documents)
        return np.bincount(self.documents, values, minlength=self.num_documents) / sizes

    def losses(self, index: int, threshold: float) -> DocumentLosses:
        """Returns the share of each document's tokens that an exit is sure of and wrong about.

        Tokens that have left at an earlier exit count too. So the losses of an exit do not depend on the thresholds of
        other exits, and the share that is wrong where all exits act is at most the sum over exits.
        """
        return self.by_document((self.confidences[index] >= threshold) & self.differs[index])

    def leaving(self, thresholds: Mapping[int, float]) -> Int64[np.ndarray, "M"]:
        """Returns the index of the exit at which each token leaves; -1: it runs the full depth.

        Args:
            thresholds: Number of depths before an exit to its threshold.
        """
        found = np.full(self.num_tokens, -1, dtype=np.int64)
        for index, depth in reversed(list(enumerate(self.depths))):
            if depth in thresholds:
                found[self.confidences[index] >= thresholds[depth]] = index
        return found


def document_batches(documents: Documents) -> Iterator[TableBatch]:
    """Yields all documents, longest first."""
    order = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    while order:
        length = len(documents[order[0]])
        rows, order = order[: max(1, BATCH_TOKENS // length)], order[max(1, BATCH_TOKENS // length) :]
        input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
        is_token = torch.zeros(len(rows), length, dtype=torch.bool)
        for row, index in enumerate(rows):
            ids = documents[index]
            input_ids[row, : len(ids)] = torch.from_numpy(ids)
            is_token[row, : len(ids)] = True
        yield TableBatch(input_ids, is_token, tuple(rows))


@torch.inference_mode()
def fill_table(
    model: RefoldForCausalLM, documents: Documents, measure: str, progress: DocumentProgress | None = None
) -> ExitTable:
    """Runs a model over documents, all exits at once, with the keys and values of the full depth.

    Args:
        model: A model with exits.
        documents: Documents of at least one token.
        measure: Measure of confidence.
        progress: Told the number of documents.
    """
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    numbers: list[np.ndarray] = []
    done = 0
    with evaluating(model):
        for batch in document_batches(documents):
            columns.append(_compare(model, batch, measure))
            lengths = batch.is_token.sum(-1).numpy()
            numbers.append(np.repeat(np.array(batch.documents, dtype=np.int64), lengths))
            done += len(batch.documents)
            if progress is not None:
                progress(done, len(documents))
    confidences, differs, full = (torch.cat(parts, -1).cpu().numpy() for parts in zip(*columns, strict=True))
    depths = tuple(index + 1 for index in model.model.exit_depths)
    return ExitTable(depths, confidences, differs, full, np.concatenate(numbers), len(documents))


def _compare(model: RefoldForCausalLM, batch: TableBatch, measure: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns confidences `[E, M]`, errors `[E, M]` and the full depth's tokens `[M]` of a batch."""
    device = model.device
    final, exits = predict_exits(model, batch.input_ids.to(device))
    index = batch.is_token.reshape(-1).nonzero().squeeze(-1).to(device)
    flat = final.flat(index)
    flat_exits = [
        ExitPredictions(
            left.depths, left.predictions.flat(index), None if left.gate is None else left.gate.reshape(-1)[index]
        )
        for left in exits
    ]
    sure, differs, full = [], [], []
    for rows in chunks(len(index), final.head.vocab_size, 2, CHUNK_BYTES):
        best = flat.head.logits(flat.hidden[rows]).argmax(-1)
        previous: Tensor | None = None
        sure_here, differs_here = [], []
        for left in flat_exits:
            logits = left.predictions.head.logits(left.predictions.hidden[rows])
            gate = None if left.gate is None else left.gate[rows]
            outputs = gate if reads_gate(measure) and gate is not None else logits
            sure_here.append(confidence(measure, outputs, previous).float())
            previous = logits.argmax(-1)
            differs_here.append(previous != best)
        sure.append(torch.stack(sure_here))
        differs.append(torch.stack(differs_here))
        full.append(best)
    return torch.cat(sure, -1), torch.cat(differs, -1), torch.cat(full)


class Skipped(NamedTuple):
    """Tokens of a pass in which some left early and gave their keys and values from the stream at the exit.

    Attributes:
        tokens: Likeliest token of each position, from the exit or the full depth.
        leaving: Index of the exit; -1: full depth.
    """

    tokens: Int64[Tensor, "B T"]
    leaving: Int64[Tensor, "B T"]


@torch.inference_mode()
def run_skipping(
    model: RefoldForCausalLM, input_ids: Int64[Tensor, "B T"], measure: str, thresholds: Mapping[int, float]
) -> Skipped:
    """Runs whole texts as an engine runs them token by token with `kv: propagate`.

    The stream of a token that has left stays as it is, and deeper depths make its keys and values from it.

    Args:
        model: A model whose depths behind the first exit keep no recurrent state.
        input_ids: Tokens, padded on the right.
        measure: Measure of confidence.
        thresholds: Number of depths before an exit to its threshold.
    """
    stack: Any = model.model
    streams = stack.embed_tokens(input_ids)
    if stack.embedding_scale != 1.0:
        streams = streams * torch.tensor(stack.embedding_scale, dtype=streams.dtype)
    batch = stack.batch(streams, is_packed=False)
    leaving = torch.full(input_ids.shape, -1, dtype=torch.int64, device=input_ids.device)
    tokens, previous, shared = torch.zeros_like(leaving), None, None
    for depth in range(1, len(stack.depths) + 1):
        ran, shared = stack.run(range(depth - 1, depth), streams, batch, None, shared)
        left = (leaving >= 0).unsqueeze(-1)
        streams = torch.where(left, streams, ran)
        is_last = depth == len(stack.depths)
        if not is_last and depth not in thresholds:
            continue
        normed = stack.norm_after(depth - 1)(streams)
        stays = leaving < 0
        if is_last:
            tokens = torch.where(stays, _decide(model, normed, depth)[0], tokens)
        else:
            gates = stack.exit_parts(depth - 1).gate(normed) if reads_gate(measure) else None
            best, sure = _decide(model, normed, depth, measure, gates, previous)
            leaves = stays & (sure >= thresholds[depth])
            tokens = torch.where(leaves, best, tokens)
            leaving = torch.where(leaves, stack.exit_depths.index(depth - 1), leaving)
            previous = best
    return Skipped(tokens, leaving)


def _decide(
    model: RefoldForCausalLM,
    normed: Tensor,
    depth: int,
    measure: str = "top1",
    gates: Tensor | None = None,
    previous: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the likeliest tokens `[B, T]` and the confidences."""
    shape, flat = normed.shape[:-1], normed.reshape(-1, normed.shape[-1])
    head = head_of(model, depth)
    flat_gates, before = (None if each is None else each.reshape(-1) for each in (gates, previous))
    best, sure = [], []
    for rows in chunks(len(flat), head.vocab_size, 1, CHUNK_BYTES):
        logits = head.logits(flat[rows])
        outputs = logits if flat_gates is None else flat_gates[rows]
        sure.append(confidence(measure, outputs, None if before is None else before[rows]))
        best.append(logits.argmax(-1))
    return torch.cat(best).view(shape), torch.cat(sure).view(shape)
