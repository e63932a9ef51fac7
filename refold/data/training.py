"""Placeholder until the data layer's author replaces this file (same entry point)."""

from dataclasses import dataclass

from refold.data.packing import PackedSequence, PackedSequences
from refold.data.readers import DataSource, open_data
from refold.data.tokens import tokenise
from refold.errors import DataError


@dataclass
class TrainingData:
    sequences: PackedSequences
    identity: str
    tokens_per_epoch: int | None
    name: str

    def batch(self, position: int, count: int) -> PackedSequence:
        return self.sequences.batch(position, count)


def open_training_data(data, tokenizer, *, context, seed, budget, cache_folder, form="text", vocab_size=None, workers=None, on_progress=None):
    source = data if isinstance(data, DataSource) else open_data(data)
    t = tokenise(source, tokenizer, budget=budget, seed=seed, cache_folder=cache_folder)
    largest = int(t.tokens.max())
    if vocab_size is not None and largest >= vocab_size:
        raise DataError(f"{source.name}: tokens below the model's {vocab_size} are required (got {largest}); use the tokenizer the model was trained with")
    import hashlib
    return TrainingData(PackedSequences(t.tokens, t.offsets, context, seed), hashlib.sha256(t.tokens.tobytes()+t.offsets.tobytes()).hexdigest(), t.num_tokens, source.name)
