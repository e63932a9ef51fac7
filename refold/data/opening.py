"""Opens training data."""

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from refold.data.blocks import Field, Form
from refold.data.chat import ChatEncoder
from refold.data.encoder import Encoder, TextEncoder
from refold.data.location import HubName, Location, open_dataset, open_hub, parse_location
from refold.data.mixture import Interleave, MixedData, Mixture
from refold.data.readers import DataSource, open_data
from refold.data.streams import DatasetStream, DocumentStream, IterableStream
from refold.data.training_data import WINDOW_TOKENS, StoredData, StreamedData, TrainingData, store
from refold.errors import DataError

DataArgument = str | Path | DataSource | DocumentStream | Mixture | Iterable[Any]
"""What can be data: a string (`refold.data.location` has the spellings) or path; an opened source or stream; a mixture;
a `datasets.Dataset` or `datasets.IterableDataset`; a list of all these; any other object that gives texts, or lists of
messages, whenever it is iterated."""


def open_training_data(
    data: DataArgument,
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
                window_tokens=window_tokens,
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

    parts = _weighted_parts(data)
    if len(parts) == 1:
        return open_part(_one_source(parts[0][0], form), budget)
    interleave = Interleave([weight for _, weight in parts])
    budgets: list[int | None] = [None] * len(parts)
    if budget is not None:
        num_sequences = -(-budget // context)
        budgets = [context * interleave.most(number, num_sequences) for number in range(len(parts))]
    sources = [_one_source(part, form) for part, _ in parts]
    return MixedData([open_part(*each) for each in zip(sources, budgets, strict=True)], interleave)


def _weighted_parts(data: Any) -> list[tuple[list[Any], float]]:
    """Returns lists of things that make up one source each, with weights; strings are taken apart."""
    if isinstance(data, Mixture):
        found = [(_entries(part), float(weight)) for part, weight in data.parts]
        if not found:
            raise DataError("data: a mixture of at least one part is required (got none)")
        Interleave([weight for _, weight in found])
        return found
    entries = _entries(data)
    weights = [entry.weight if isinstance(entry, Location) else None for entry in entries]
    if all(weight is None for weight in weights):
        return [(entries, 1.0)]
    if None in weights:
        raise DataError("data: weights for all parts or for none are required (got some); add `=WEIGHT` to the others")
    found = [([entry], weight) for entry, weight in zip(entries, weights, strict=True) if weight is not None]
    Interleave([weight for _, weight in found])
    return found


def _entries(data: Any) -> list[Any]:
    given = data if isinstance(data, list | tuple) else [data]
    if not given:
        raise DataError("data: at least one file or data set is required (got an empty list)")
    return [parse_location(each) if isinstance(each, str) else each for each in given]


def _one_source(entries: Sequence[Any], form: Form) -> DataSource | DocumentStream:
    """Opens what makes up one source; neighbouring files become one list of blocks."""
    opened: list[DataSource | DocumentStream] = []
    for field, group in groupby(entries, _field_of_path):
        if field is None:
            opened += [_open(entry, form) for entry in group]
        else:
            paths: list[Any] = [entry.place if isinstance(entry, Location) else entry for entry in group]
            opened.append(open_data(paths, field=field or None, form=form))
    if len(opened) == 1:
        return opened[0]
    blocks: list[Any] = []
    for source in opened:
        if isinstance(source, DocumentStream):
            raise DataError(
                f"{source.name}: weights are required for a stream beside other data (got none); give all parts weights"
            )
        blocks += source.blocks
    name = ", ".join(source.name for source in opened)
    return DataSource(tuple(blocks), repr([source.identity for source in opened]), name)


def _field_of_path(entry: Any) -> str | None:
    """Returns which field a path is read with, empty for the usual one; None for what is no path."""
    if isinstance(entry, Path):
        return ""
    if isinstance(entry, Location) and isinstance(entry.place, Path):
        return entry.field or ""
    return None


def _open(entry: Any, form: Form) -> DataSource | DocumentStream:
    if isinstance(entry, DataSource | DocumentStream):
        return entry
    if isinstance(entry, Location):
        assert isinstance(entry.place, HubName)
        return open_hub(entry.place, Field.of(entry.field, form))
    field = Field.of(None, form)
    datasets = sys.modules.get("datasets")  # who has one of its objects has imported it
    if datasets is not None:
        if isinstance(entry, datasets.Dataset):
            return open_dataset(entry, field, "data set in memory")
        if isinstance(entry, datasets.IterableDataset):
            return DatasetStream(entry, field, "streamed data set")
        if isinstance(entry, datasets.DatasetDict | datasets.IterableDatasetDict):
            raise DataError(f"data: one split is required (got a dict of {sorted(entry)}); give `data['train']`")
    if isinstance(entry, Iterable):
        return IterableStream(entry, field)
    got = type(entry).__name__
    raise DataError(f"data: a path, a source, a data set or an iterable of texts is required (got {got})")
