"""A pass of a model, and a reference, over windows, with the time of each part."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from refold.data.packing import IGNORED
from refold.data.tokens import TokenisedDocuments
from refold.data.windows import window_batches, window_spans
from refold.errors import DataError
from refold.evaluation.cut_reference import CutReference
from refold.evaluation.document_sums import DocumentSums
from refold.evaluation.reference import Reference
from refold.evaluation.subject import evaluating
from refold.modeling.model import RefoldForCausalLM
from refold.scoring.agreement import token_scores
from refold.scoring.head import Predictions
from refold.scoring.predict import ExitPredictions, predict, predict_exits


class Stopwatch:
    """Sums wall-clock seconds by name.

    Attributes:
        seconds: Seconds by name.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Adds the seconds of the body; a CUDA or MPS device is synchronised at its end."""
        start = time.perf_counter()
        try:
            yield
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            elif device is not None and device.type == "mps":
                torch.mps.synchronize()
        finally:
            self.seconds[name] += time.perf_counter() - start


WindowProgress = Callable[[int, int], None]
"""Called with the number of windows done and of all windows."""


class WindowPass:
    """One pass over tokenised documents.

    Args:
        model: The model to score, with all exits of its blueprint.
        against: A reference with the same vocabulary, on the same device; None: no comparison.
        num_documents: Number of documents in the data.
        watch: Stopwatch for `model`, `against` and `score`.

    Attributes:
        exits: For each exit of the model, the number of depths before it.
        gated: For each exit, whether it has a gate.
        sums: Sums of the model by document.
        against_sums: Sums of the reference by document.
        exit_sums: Sums of each exit by document, compared with the full depth.
        right_gates: For each exit, the number of scored tokens whose gate predicts correctly whether exit and full
            depth have the same likeliest token.
    """

    def __init__(
        self, model: PreTrainedModel, against: Reference | CutReference | None, num_documents: int, watch: Stopwatch
    ):
        self._model, self._against, self._watch = model, against, watch
        exits = {}
        if isinstance(model, RefoldForCausalLM):
            depths = model.config.read_blueprint().depths
            exits = {index + 1: depth.exit for index, depth in enumerate(depths) if depth.exit is not None}
        self.exits = list(exits)
        self.gated = [exit_.gate for exit_ in exits.values()]
        self.sums = DocumentSums(num_documents)
        self.against_sums = DocumentSums(num_documents)
        self.exit_sums = [DocumentSums(num_documents) for _ in self.exits]
        self.right_gates = [0 for _ in self.exits]

    def run(
        self, tokenised: TokenisedDocuments, context: int, stride: int, batch_size: int, progress: WindowProgress | None
    ) -> None:
        """Scores every window, longest windows first, and frees the reference.

        Raises:
            DataError: The stride does not fit the context, or no document has two tokens.
        """
        num_windows = len(window_spans(tokenised, context=context, stride=stride))
        if not num_windows:
            raise DataError(f"data: a document of at least two tokens is required (got {tokenised.num_tokens} in all)")
        with torch.inference_mode(), evaluating(self._model):
            self._score(tokenised, context, stride, batch_size, num_windows, progress)
        if self._against is not None:
            self._against.let_go()

    def _score(
        self,
        tokenised: TokenisedDocuments,
        context: int,
        stride: int,
        batch_size: int,
        num_windows: int,
        progress: WindowProgress | None,
    ) -> None:
        done = 0
        # Padding is on the right, where a causal model never reads it from a real token. So no mask is needed, and
        # attention back-ends are faster without a mask.
        for batch in window_batches(tokenised, context=context, stride=stride, batch_size=batch_size):
            self._add(batch.documents, batch.input_ids, batch.labels)
            done += len(batch.documents)
            if progress is not None:
                progress(done, num_windows)

    def _add(
        self, documents: Int64[Tensor, "B"], input_ids: Int64[Tensor, "B T"], labels: Int64[Tensor, "B T"]
    ) -> None:
        device = self._model.device
        reference = None
        with self._watch.measure("model", device):
            predictions, exits = self._predict(input_ids.to(device))
        if self._against is not None:
            with self._watch.measure("against", device):
                reference = self._against.predict(input_ids)
        with self._watch.measure("score", device):
            here = labels.to(device)
            found = token_scores(predictions, here, reference=reference)
            self.sums.add(documents, labels, found)
            if found.reference is not None:
                self.against_sums.add(documents, labels, found.reference)
            for place, left in enumerate(exits):
                scores = token_scores(left.predictions, here, reference=predictions)
                self.exit_sums[place].add(documents, labels, scores)
                if left.gate is not None and scores.agrees is not None:
                    is_right = (left.gate > 0) == scores.agrees
                    self.right_gates[place] += int(is_right[here != IGNORED].sum())

    def _predict(self, input_ids: Int64[Tensor, "B T"]) -> tuple[Predictions, list[ExitPredictions]]:
        return predict_exits(self._model, input_ids) if self.exits else (predict(self._model, input_ids), [])
