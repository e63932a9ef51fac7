"""Opens training data."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from refold.data.chat import ChatEncoder
from refold.data.corpus import MOST_BYTES_PER_TOKEN, Data, open_together, weighted_parts
from refold.data.encoder import Encoder, TextEncoder
from refold.data.field import Form
from refold.data.mixture import Interleave, MixedData
from refold.data.readers import DataSource
from refold.data.spool import SPOOL_BYTES
from refold.data.streams import DocumentStream
from refold.data.training_data import WINDOW_TOKENS, StoredData, StreamedData, TrainingData, store
from refold.errors import DataError


def open_training_data(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    seed: int,
    budget: int | None,
    cache_folder: Path,
    form: Form = "text",
    vocab_size: int | None = None,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    window_tokens: int = WINDOW_TOKENS,
) -> TrainingData:
    """Opens data to train on: tokenises it into the cache, or finds it there, or begins a stream.

    In a list, weights (`PATH=0.7`) make a mixture; without weights all is one source. Streams are read as training
    advances and cannot be part of one source, but of a mixture. Several processes may open one cache at a time: one
    tokenises, the others wait.

    Args:
        data: what to read.
        tokenizer: of the model to train.
        context: tokens of a sequence.
        seed: order of documents and sequences.
        budget: tokens that will be read at most; no more of them is tokenised. None: all, in one order for all seeds.
        cache_folder: where tokens are kept.
        form: `text`, or `chat` for lists of messages.
        vocab_size: tokens the model knows; None: no check.
        workers: threads that encode; None: as many as there are cores, or as the tokenizer's own settings say.
        on_progress: called with the number of tokens so far while a source is tokenised.
        window_tokens: tokens of a stream that are shuffled together.

    Raises:
        DataError: data is missing, empty, broken or of another form; a weight is not above 0; the tokenizer has no chat
            template or tokens the model does not know; the cache is torn or cannot be written.
    """
    if context < 2:
        raise DataError(f"data: a sequence length of at least 2 tokens is required (got {context})")
    if budget is not None and budget < 1:
        raise DataError(f"data: a budget of at least 1 token is required (got {budget})")
    encoder: Encoder = ChatEncoder(tokenizer) if form == "chat" else TextEncoder(tokenizer)

    def open_part(part: DataSource | DocumentStream, budget: int | None) -> TrainingData:
        if isinstance(part, DocumentStream):
            return StreamedData(
                part,
                encoder,
                context=context,
                seed=seed,
                cache_folder=cache_folder,
                vocab_size=vocab_size,
                workers=workers,
                # A window past the budget would be encoded and never read.
                window_tokens=window_tokens if budget is None else max(context, min(window_tokens, budget)),
            )
        shards = store(
            part,
            encoder,
            budget=budget,
            seed=seed,
            cache_folder=cache_folder,
            workers=workers,
            on_progress=on_progress,
        )
        shards.require_vocabulary(vocab_size)
        return StoredData(shards, context, seed)

    limit = SPOOL_BYTES if budget is None else min(SPOOL_BYTES, MOST_BYTES_PER_TOKEN * budget + 2**20)
    parts = weighted_parts(data, form)
    if len(parts) == 1:
        return open_part(open_together(parts[0][0], form, limit), budget)
    interleave = Interleave([weight for _, weight in parts])
    budgets: list[int | None] = [None] * len(parts)
    if budget is not None:
        num_sequences = -(-budget // context)
        budgets = [context * interleave.most(number, num_sequences) for number in range(len(parts))]
    sources = [open_together(part, form, limit) for part, _ in parts]
    return MixedData([open_part(*each) for each in zip(sources, budgets, strict=True)], interleave)
