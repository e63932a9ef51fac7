"""Training data that is tokenised once and kept on disk."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refold.data.encoder import Encoder, digest
from refold.data.encoding import Encoding
from refold.data.packing import PackedSequence
from refold.data.readers import DataSource
from refold.data.shard_writer import ShardWriter, cached
from refold.data.shards import TokenShards
from refold.data.training_data import TrainingData


class StoredData(TrainingData):
    """The tokens of a folder of shards, repeated in a new order per epoch."""

    def __init__(self, shards: TokenShards, context: int, seed: int) -> None:
        self.name = shards.index.name
        self.tokens_per_epoch = shards.index.num_tokens
        self.identity = hashlib.sha256(f"{shards.index.sha256} {context} {seed}".encode()).hexdigest()
        self._packed = shards.packed(context, seed)

    def sequence(self, position: int) -> PackedSequence:
        return self._packed.sequence(position)


def store(
    source: DataSource[Any],
    encoder: Encoder,
    *,
    budget: int | None,
    seed: int,
    cache_folder: Path,
    workers: int | None,
    on_progress: Callable[[int], None] | None,
) -> TokenShards:
    """Tokenises a source into the cache, or finds it there.

    Args:
        source: the documents.
        encoder: what turns them into tokens.
        budget: tokens; None: all, in file order.
        seed: which documents the budget takes, and their order.
        cache_folder: where shards are kept, in folders named by a hash of source, tokenizer, budget and seed.
        workers: threads that encode.
        on_progress: called with the number of tokens so far.

    Raises:
        DataError: there is no document, one is broken, or the cache is torn or cannot be written.
    """
    order = None if budget is None else seed
    key = digest(["refold-shards-1", *encoder.key(), encoder.has_targets, source.identity, budget, order])
    folder = cache_folder / f"tokens-{key}"

    def make() -> None:
        documents = source.documents(order)
        encoding = Encoding(documents, encoder, budget=budget, workers=workers, on_progress=on_progress)
        with ShardWriter(folder, encoder.dtype, encoder.has_targets, source.name) as writer:
            for document in encoding:
                writer.add(document)
            writer.is_whole_source = encoding.is_whole_source

    return cached(folder, make)
