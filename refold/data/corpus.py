"""Opening of all data that a user can name: paths, hub data sets, and objects in memory."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from refold.data.field import Document, Field, Form
from refold.data.location import HubName, Location, exists, open_dataset, open_hub, parse_location
from refold.data.mixture import Interleave, MixedSource, Mixture, describe_one_kind
from refold.data.readers import DataSource, from_documents, open_paths
from refold.data.spool import SPOOL_BYTES, spool
from refold.data.streams import DatasetStream, DocumentStream, IterableStream, read_items
from refold.errors import DataError

Data = str | Path | Location | DataSource | DocumentStream | Mixture | Iterable[Any]
"""One of: a path or a string (forms in `refold.data.location`); a list of texts, rows or messages; a pandas data frame
or series; a `datasets.Dataset` or `datasets.IterableDataset`; a generator or any other iterable of texts, rows or lists
of messages; an opened source or stream; a list of several of these; a `Mixture` of them."""

MOST_KINDS = 16
"""Most parts of a list that are reported as kinds of text; a longer list is reported as a whole."""

MOST_BYTES_PER_TOKEN = 16
"""Bytes that are read from a generator for each token asked for; well above the mean of any language."""

_PATH_END = re.compile(r"\.\w{1,7}(\?(field|name)=\S+)?(=[\d.]+)?$")
_LONGEST_NAME = 255


def open_text(data: Data, *, form: Form = "text", limit: int = SPOOL_BYTES) -> DataSource[Any]:
    """Opens data as one source that can be read several times and in any order.

    A list of data becomes a `MixedSource` with its parts and, if given, their weights.

    Args:
        data: The data to read.
        form: `text`, or `chat` for lists of messages.
        limit: Bytes to keep of a generator or stream, because it cannot be read in any order.

    Raises:
        DataError: Data is missing, empty, broken or of another form; a weight is not above 0.
    """
    if isinstance(data, DataSource):
        return data
    opened: list[DataSource[Any]] = []
    given = weighted_parts(data, form)
    for entries, _ in given:
        whole, parts = _open_together([_stored(entry, form, limit) for entry in entries], form)
        assert isinstance(whole, DataSource)
        if len(given) == 1:
            if not 1 < len(parts) <= MOST_KINDS:
                return whole
            return MixedSource.of_whole(whole, [part for part in parts if isinstance(part, DataSource)])
        opened.append(whole)
    return MixedSource.weighted(opened, [weight for _, weight in given])


def weighted_parts(data: Any, form: Form) -> list[tuple[list[Any], float]]:
    """Splits data into parts with weights; a part is a list of entries that are opened as one source.

    Raises:
        DataError: There is no part, only some parts have weights, or a weight is not above 0.
    """
    if isinstance(data, MixedSource) and data.weights is not None:
        return [([part], weight) for part, weight in zip(data.parts, data.weights, strict=True)]
    if isinstance(data, Mixture):
        found = [(_entries(part, form), float(weight)) for part, weight in data.parts]
        if not found:
            raise DataError("data: a mixture of at least one part is required (got none)")
        Interleave([weight for _, weight in found])
        return found
    entries = _entries(data, form)
    weights = [entry.weight if isinstance(entry, Location) else None for entry in entries]
    if all(weight is None for weight in weights):
        return [(entries, 1.0)]
    if None in weights:
        raise DataError("data: weights for all parts or for none are required (got some); add `=WEIGHT` to the others")
    found = [([entry], weight) for entry, weight in zip(entries, weights, strict=True) if weight is not None]
    Interleave([weight for _, weight in found])
    return found


def describe_training(data: Data, form: Form = "text") -> tuple[str, ...]:
    """Returns the notes about training data: one line if the data has a single part, which may be text of one kind.

    Raises:
        DataError: Data is missing or weights are wrong, as for `open_text`.
    """
    if form == "chat":
        return ()
    given = weighted_parts(data, form)
    entry = given[0][0][0]
    if len(given) > 1 or len(given[0][0]) > 1:
        return ()
    line = describe_one_kind(entry if isinstance(entry, MixedSource) else _name(entry), "healing")
    return () if line is None else (line,)


def name_parts(data: Data, form: Form = "text") -> dict[str, float | None]:
    """Returns the share of each part of data by the part's name, without reading a document; None: no weights.

    Raises:
        DataError: Data is missing or weights are wrong, as for `open_text`.
    """
    given = weighted_parts(data, form)
    if len(given) == 1:
        entries = given[0][0]
        parts = entries[0].parts if isinstance(entries[0], MixedSource) else entries
        return {_name(part): None for part in parts}
    total = sum(weight for _, weight in given)
    return {", ".join(map(_name, entries)): weight / total for entries, weight in given}


def _name(entry: Any) -> str:
    if isinstance(entry, Location):
        place = str(entry.place) if isinstance(entry.place, Path) else f"hf://{entry.place.name}"
        return entry.name or place
    return str(entry) if isinstance(entry, Path) else getattr(entry, "name", None) or "the data given"


def open_together(entries: Sequence[Any], form: Form, limit: int) -> DataSource | DocumentStream:
    """Opens entries as one source or stream, and copies iterators to disk up to a limit of bytes."""
    kept = [_stored(entry, form, limit) if isinstance(entry, Iterator) else entry for entry in entries]
    return _open_together(kept, form)[0]


def _entries(data: Any, form: Form) -> list[Any]:
    if not isinstance(data, list | tuple):
        return [_entry(data)]
    if not data:
        raise DataError("data: at least one file or data set is required (got an empty list)")
    documents = _documents_of(data, form)
    return [_entry(each) for each in data] if documents is None else [documents]


def _entry(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    if "\n" in given:
        raise DataError(
            f"data: the path of a file is required (got a text of {len(given):,} characters); give it in a list"
        )
    return parse_location(given)


def _documents_of(items: Sequence[Any], form: Form) -> DataSource | None:
    """Returns a source if the items of a list are documents (rows, conversations, texts), or None if they are not."""
    field = Field.of(None, form)
    name = "documents in memory"
    are_rows = isinstance(items[0], Mapping)
    are_talks = isinstance(items[0], list | tuple) and bool(items[0]) and isinstance(items[0][0], Mapping)
    if are_rows or (are_talks and form == "chat"):
        return from_documents(read_items(items, field, name), name=name)
    texts = [item for item in items if isinstance(item, str)]
    if form != "text" or len(texts) < len(items) or not any(_is_prose(text) for text in texts):
        return None
    for number, text in enumerate(texts):
        if _may_be_path(text):
            raise DataError(
                f"data[{number}]: texts only, or paths only, are required in a list (got {text[:60]!r} among texts); "
                f"give texts as refold.from_documents([...])"
            )
    return from_documents(texts, name=name)


def _is_prose(text: str) -> bool:
    """Returns whether a string is certainly a text and no path."""
    if "\n" in text or len(text.encode("utf-8", "replace")) > _LONGEST_NAME:
        return not exists(text)
    return len(text.split()) > 3 and not _may_be_path(text)


def _may_be_path(text: str) -> bool:
    if "\n" in text or len(text.encode("utf-8", "replace")) > 16 * _LONGEST_NAME:
        return False
    is_name = (
        _PATH_END.search(text) is not None or ("/" in text and len(text.split()) < 4) or "://" in text.split(" ")[0]
    )
    return is_name or (bool(text) and exists(text))


def _open_together(
    entries: Sequence[Any], form: Form
) -> tuple[DataSource | DocumentStream, Sequence[DataSource | DocumentStream]]:
    """Returns one source of all entries, and the source of each; neighbouring files are opened together."""
    wholes: list[DataSource | DocumentStream] = []
    parts: list[DataSource | DocumentStream] = []
    for field, group in groupby(entries, _field_of_path):
        if field is None:
            opened = [_open(entry, form) for entry in group]
            wholes += opened
            parts += opened
        else:
            members = list(group)
            places = [entry.place if isinstance(entry, Location) else entry for entry in members]
            whole, each = open_paths(cast("list[str | Path]", places), field=field or None, form=form)
            names = {str(place): _name(entry) for place, entry in zip(places, members, strict=True)}
            wholes.append(replace(whole, name=", ".join(names[str(place)] for place in places)))
            parts += [replace(part, name=names[part.name]) for part in each]
    if len(wholes) == 1:
        return wholes[0], parts
    sources: list[DataSource] = []
    for source in wholes:
        if isinstance(source, DocumentStream):
            raise DataError(
                f"{source.name}: weights are required for a stream beside other data (got none); give all parts weights"
            )
        sources.append(source)
    return DataSource.join(sources), parts


def _field_of_path(entry: Any) -> str | None:
    """Returns the field of a path, empty for the default field, or None if the entry is no path."""
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
        found = open_hub(entry.place, Field.of(entry.field, form))
        return replace(found, name=entry.name) if entry.name and isinstance(found, DataSource) else found
    field = Field.of(None, form)
    # An object of these libraries exists only if its library is imported already.
    datasets, pandas = sys.modules.get("datasets"), sys.modules.get("pandas")
    if datasets is not None:
        if isinstance(entry, datasets.Dataset):
            return open_dataset(entry, field, "data set in memory")
        if isinstance(entry, datasets.IterableDataset):
            return DatasetStream(entry, field, "streamed data set")
        if isinstance(entry, datasets.DatasetDict | datasets.IterableDatasetDict):
            raise DataError(f"data: one split is required (got a dict of {sorted(entry)}); give `data['train']`")
    if pandas is not None and isinstance(entry, pandas.DataFrame):
        if field.name not in entry.columns:
            remedy = f"rename yours, `frame.rename(columns={{...: {field.name!r}}})`"
            raise Field(field.name, form, "column").missing(map(str, entry.columns), "data frame", remedy)
        entry = entry[field.name]
    if pandas is not None and isinstance(entry, pandas.Series):
        if (empty := int(entry.isna().sum())) > 0:
            raise DataError(
                f"data frame: a text in every row is required ({empty} rows have none); drop them by `dropna()`"
            )
        return from_documents(read_items(entry.tolist(), field, "data frame"), name="data frame")
    if isinstance(entry, bytes | Mapping) or not isinstance(entry, Iterable):
        got = type(entry).__name__
        raise DataError(f"data: a path, a source, a data set or an iterable of texts is required (got {got})")
    return IterableStream(entry, field)


def _stored(entry: Any, form: Form, limit: int) -> Any:
    """Returns an entry that can be read in any order; iterators and streams are copied up to a limit of bytes."""
    field = Field.of(None, form)
    if isinstance(entry, Iterator):
        return spool(read_items(entry, field, "a generator"), "a generator", limit)
    opened = entry if _field_of_path(entry) is not None else _open(entry, form)
    return spool(_from_stream(opened), opened.name, limit) if isinstance(opened, DocumentStream) else opened


def _from_stream(stream: DocumentStream) -> Iterator[Document]:
    cursor = stream.start(None)
    while (document := cursor.next()) is not None:
        yield document
