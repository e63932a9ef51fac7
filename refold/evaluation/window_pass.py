"""Runs a model over windows and times each part."""

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
from refold.evaluation.document_sums import DocumentSums
from refold.evaluation.reference import Reference
from refold.evaluation.subject import evaluating
from refold.modeling.model import RefoldForCausalLM
from refold.scoring.agreement import token_scores
from refold.scoring.head import Predictions
from refold.scoring.predict import ExitPredictions, predict, predict_exits


class Stopwatch:
    """Adds up wall-clock seconds under names.

    Attributes:
        seconds: By name.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Counts the body's seconds; with a CUDA or MPS device until it has finished its work."""
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
"""Called with windows done and windows in all."""


class WindowPass:
    """One pass over tokenised documents.

    Args:
        model: The model to score; where its blueprint has exits they are scored too.
        against: A model with the same vocabulary, on the same device, for the same windows; or None.
        num_documents: Documents in the data.
        watch: Gets seconds under `model`, `against` and `score`.

    Attributes:
        exits: For each exit of the model, how many depths run before it.
        gated: For each, whether it has a gate.
        sums: The model's sums by document.
        against_sums: The other model's.
        exit_sums: Those of each exit, compared with the full depth.
        right_gates: For each exit the scored tokens at which its gate says what is so: that its likeliest token is that
            of the full depth, or that it is not.
    """

    def __init__(self, model: PreTrainedModel, against: Reference | None, num_documents: int, watch: Stopwatch):
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
        """Scores every window, longest first.

        Raises:
            DataError: The stride does not fit the context, or no document has two tokens.
        """
        num_windows = len(window_spans(tokenised, context=context, stride=stride))
        if not num_windows:
            raise DataError(f"data: a document of at least two tokens is required (got {tokenised.num_tokens} in all)")
        with torch.inference_mode(), evaluating(self._model):
            self._score(tokenised, context, stride, batch_size, num_windows, progress)

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
        # Windows are padded on the right, where causal models never look from a real token: no mask is needed, and
        # attention back-ends are faster without.
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
