"""Locations of data as strings, and hub data sets."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refold.data.blocks import Block, first_line
from refold.data.field import Document, Field
from refold.data.readers import BLOCK_BYTES, DataSource
from refold.data.streams import DatasetStream
from refold.errors import DataError
from refold.suggest import did_you_mean

_WEIGHT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_HUB = re.compile(
    r"(?P<scheme>[a-z-]+)://(?P<name>[^@:#?/]+/[^@:#?/]+)"
    r"(@(?P<revision>[^:#?]+))?(:(?P<config>[^#?]+))?(#(?P<split>[^?]+))?"
)
_OPTIONS = ("field", "name")
_SCHEMES = {"hf": False, "hf-stream": True}


@dataclass(frozen=True)
class HubName:
    """The name of a hub data set.

    Attributes:
        name: `org/name`.
        revision: Branch, tag or commit; None: the default branch.
        config: Name of a configuration; None: the default configuration.
        split: Name of a split, or a slice of a split (`train[:10%]`).
        is_streamed: Whether the data set is read while training goes on.
    """

    name: str
    revision: str | None
    config: str | None
    split: str
    is_streamed: bool


@dataclass(frozen=True)
class Location:
    """The parts of a string that names data.

    Attributes:
        place: A path or a hub data set.
        field: Field of the document; None: the default field.
        weight: Weight in a mixture; None: not given.
        name: Name of the kind of text in results and messages; None: the place.
    """

    place: Path | HubName
    field: str | None = None
    weight: float | None = None
    name: str | None = None


def parse_location(text: str, field: str | None = None) -> Location:
    """Parses `PATH` or `hf://org/name[@revision][:config][#split]`, each with options and `=WEIGHT` if wanted.

    Options are `?field=NAME`, the field of the document, `?name=NAME`, the name in results, or `?field=A&name=B`.

    Args:
        text: The string as the user wrote it.
        field: Field of the document if the string names none.

    Raises:
        DataError: The scheme or an option is unknown, or a part is missing.
    """
    if exists(text):
        return Location(Path(text), field)
    head, sign, tail = text.rpartition("=")
    if sign and _WEIGHT.fullmatch(tail):
        bare = parse_location(head, field)
        if bare.weight is not None and not exists(head):
            raise DataError(f"{text}: one weight is required (got two)")
        return replace(bare, weight=float(tail))
    place, sign, options = text.partition("?")
    given = _read_options(text, options) if sign else {}
    found = _hub_name(place) if "://" in place else Path(place)
    return Location(found, given.get("field", field), name=given.get("name"))


def exists(text: str) -> bool:
    """Returns whether a string is an existing path; False for a string that cannot be a path."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def _read_options(text: str, options: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for option in options.split("&"):
        key, _, value = option.partition("=")
        if key not in _OPTIONS or not value or key in found:
            hint = did_you_mean(key, _OPTIONS) if key not in _OPTIONS else ""
            raise DataError(
                f"{text}: `?field=NAME`, `?name=NAME` or both joined by & are required behind a question mark (got "
                f"'?{options}'){hint}"
            )
        found[key] = value
    return found


def _hub_name(text: str) -> HubName:
    found = _HUB.fullmatch(text)
    if found is None or found["scheme"] not in _SCHEMES:
        raise DataError(
            f"{text}: a data set of the hub as hf://org/name[@revision][:config][#split], or with hf-stream://, is "
            f"required (got another form)"
        )
    return HubName(
        found["name"], found["revision"], found["config"], found["split"] or "train", _SCHEMES[found["scheme"]]
    )


@dataclass(frozen=True)
class DatasetBlock(Block[Document]):
    """A range of rows of a `datasets.Dataset`; one document per row."""

    dataset: Any
    start: int
    stop: int
    field: Field
    name: str

    def documents(self) -> Sequence[Document]:
        """Returns the documents in the column.

        Raises:
            DataError: A row has no document.
        """
        values = self.dataset[self.start : self.stop][self.field.name]
        return [self.field.read(value, f"{self.name}: row {self.start + row}") for row, value in enumerate(values)]


def open_dataset(dataset: Any, field: Field, name: str, block_bytes: int = BLOCK_BYTES) -> DataSource[Document]:
    """Returns the data source of a `datasets.Dataset`.

    Args:
        dataset: One split, memory-mapped or in memory.
        field: The column of the documents.
        name: Name for messages.
        block_bytes: Nominal size of a block.

    Raises:
        DataError: The column is missing, or there are no rows.
    """
    column = replace(field, noun="column")
    if column.name not in dataset.column_names:
        hint = did_you_mean(column.name, dataset.column_names)
        raise DataError(f"{name}: column '{column.name}' is required (got {dataset.column_names}){hint}")
    if not len(dataset):
        raise DataError(f"data: at least one document is required (got none in {name})")
    rows = max(1, math.ceil(len(dataset) * block_bytes / max(1, dataset.data.nbytes)))
    blocks = tuple(
        DatasetBlock(dataset, start, min(start + rows, len(dataset)), column, name)
        for start in range(0, len(dataset), rows)
    )
    # The fingerprint changes with every transformation and with the files of the data set.
    return DataSource(blocks, f"{dataset._fingerprint} {column.name} {column.form} {rows}", name)


def open_hub(wanted: HubName, field: Field) -> DataSource[Document] | DatasetStream:
    """Opens a hub data set without running code of its repository.

    Args:
        wanted: Name of the data set.
        field: The column of the documents.

    Raises:
        DataError: There is no such data set, revision, configuration, split or column, or the hub cannot be reached.
    """
    import datasets

    name = f"hf://{wanted.name}" + (f"@{wanted.revision}" if wanted.revision else "")
    with _explained(name):
        revision = _resolve(wanted)
        loaded: Any = datasets.load_dataset(
            wanted.name, wanted.config, split=wanted.split, revision=revision, streaming=wanted.is_streamed
        )
    if not wanted.is_streamed:
        return open_dataset(loaded, field, name)
    identity = f"{wanted.name}@{revision} {wanted.config} {wanted.split} {field.name} {field.form}"
    return DatasetStream(loaded, field, name, identity)


def _resolve(wanted: HubName) -> str | None:
    """Returns the commit of a data set; offline the given revision, which `datasets` looks up in its cache."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE and not wanted.is_streamed:
        return wanted.revision
    return HfApi().dataset_info(wanted.name, revision=wanted.revision, timeout=30).sha


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns errors of the hub client and of `datasets` into a `DataError` of one line."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise DataError(f"{name}: gated on the hub: access is required; ask there, then `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise DataError(f"{name}: no such revision on the hub; check the part after @") from None
    except errors.RepositoryNotFoundError:
        raise DataError(f"{name}: no such data set on the hub (or a private one); check the name") from None
    except errors.HFValidationError as error:
        raise DataError(f"{name}: a hub id org/name is required ({first_line(error)})") from None
    except errors.HfHubHTTPError as error:
        raise DataError(f"{name}: the hub refused ({first_line(error)}); try again later") from None
    except (errors.OfflineModeIsEnabled, ConnectionError, TimeoutError, errors.HTTPError) as error:
        raise DataError(
            f"{name}: a network is required, or with HF_HUB_OFFLINE=1 a copy in the cache ({first_line(error)}); go "
            f"online, or give files"
        ) from None
    except (DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{name}: a readable data set is required ({first_line(error)})") from None
