"""How data is named in one string: where it is, which of its fields, and its weight in a mixture.

    books.parquet                         a file or folder
    books.parquet=0.7                     with a weight
    chat.jsonl?field=turns                a field of another name
    hf://org/name                         a data set of the hub, its split `train`
    hf://org/name@revision:config#split?field=body
    hf-stream://org/name                  the same, streamed as training advances instead of downloaded first

What exists as a file under the whole string is that file, whatever `=` and `?` it has.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from refold.errors import DataError
from refold.suggest import did_you_mean

_WEIGHT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_HUB = re.compile(
    r"(?P<scheme>[a-z-]+)://(?P<name>[^@:#?/]+/[^@:#?/]+)"
    r"(@(?P<revision>[^:#?]+))?(:(?P<config>[^#?]+))?(#(?P<split>[^?]+))?"
)
_SCHEMES = {"hf": False, "hf-stream": True}


@dataclass(frozen=True)
class HubName:
    """A data set of the hub.

    Attributes:
        name: `org/name`.
        revision: branch, tag or commit; None: the default branch.
        config: name of a configuration; None: the default one.
        split: name of a split, or a slice of one (`train[:10%]`).
        is_streamed: whether it is read as training advances.
    """

    name: str
    revision: str | None
    config: str | None
    split: str
    is_streamed: bool


@dataclass(frozen=True)
class Location:
    """One string taken apart.

    Attributes:
        place: a path, or a data set of the hub.
        field: of the document; None: the usual one.
        weight: None: none was given.
    """

    place: Path | HubName
    field: str | None = None
    weight: float | None = None


def parse_location(text: str) -> Location:
    """Takes one string apart by this module's rule.

    Raises:
        DataError: it has another scheme or option, or a part of it is missing.
    """
    if Path(text).exists():
        return Location(Path(text))
    head, sign, tail = text.rpartition("=")
    if sign and _WEIGHT.fullmatch(tail):
        bare = parse_location(head)
        if bare.weight is not None and not Path(head).exists():
            raise DataError(f"{text}: one weight is required (got two)")
        return Location(bare.place, bare.field, float(tail))
    place, sign, options = text.partition("?")
    field = _field(text, options) if sign else None
    return Location(_hub_name(place) if "://" in place else Path(place), field)


def _field(text: str, options: str) -> str:
    key, _, value = options.partition("=")
    if key != "field" or not value:
        hint = did_you_mean(key, ["field"]) if key != "field" else ""
        raise DataError(f"{text}: `?field=NAME` is required behind a question mark (got '?{options}'){hint}")
    return value


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
