"""Bits per byte of held-out text, measured while a model trains."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refold.data.readers import DataSource
from refold.data.tokens import scored_bytes, tokenise
from refold.data.windows import window_batches
from refold.scoring.agreement import Scores, score
from refold.scoring.predict import predict

MAX_TOKENS = 50_000
"""Held-out tokens that are scored: enough for a curve. `refold evaluate` scores more and compares models."""
BATCH_TOKENS = 4096


class HeldOut:
    """Measures bits per byte on a text that is not used for training.

    Args:
        source: documents, read in file order up to `MAX_TOKENS`.
        tokenizer: the model's.
        context: tokens of a window; each window after a document's first scores half of them.
        cache_folder: folder for the tokens.

    Raises:
        DataError: the source has no text.
    """

    def __init__(self, source: DataSource, tokenizer: PreTrainedTokenizerBase, context: int, cache_folder: Path):
        self._tokens = tokenise(source, tokenizer, budget=MAX_TOKENS, seed=None, cache_folder=cache_folder)
        self._num_bytes = int(scored_bytes(self._tokens, tokenizer).sum())
        self._context = context

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, autocast: torch.dtype | None) -> float:
        """Returns the model's bits per byte; the model returns to its previous training mode."""
        was_training = model.training
        model.eval()
        total = Scores()
        context, device = self._context, model.device
        batches = window_batches(
            self._tokens, context=context, stride=max(1, context // 2), batch_size=max(1, BATCH_TOKENS // context)
        )
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            for batch in batches:
                total += score(predict(model, batch.input_ids.to(device)), batch.labels.to(device))
        model.train(was_training)
        return total.bits_per_byte(self._num_bytes)
