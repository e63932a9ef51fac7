"""Keys and values that depths read from earlier ones: what a recipe's `share_kv` can say."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from refold.fields import Count, LayerIndex, Section, refuse_repeats

URLS: Mapping[str, str] = {
    "first_loop": "https://arxiv.org/abs/2507.10524",
    "pairs": "https://arxiv.org/abs/2405.12981",
    "back": "https://arxiv.org/abs/2406.11274",
}
"""Recursion-wise sharing (Mixture-of-Recursions), Cross-Layer Attention, Skip-Layer Attention."""


def _kind_of_heads(value: Any) -> str:
    return "<list>" if isinstance(value, (list, tuple)) else "<name>"


def _kind_of_from(value: Any) -> str:
    return "<back>" if isinstance(value, (dict, Back)) else "<name>"


def _kind_of_share(value: Any) -> str:
    return "<list>" if isinstance(value, (list, tuple)) else "<rule>"


def _not_the_last_loop(value: Any) -> Any:
    if value == "last_loop":
        raise ValueError(
            "must be first_loop, pairs or {back: N} (got 'last_loop': earlier loops would look at what the last one "
            "makes of the tokens before, which no pass over a text has yet; decoding could, training and prefill not)"
        )
    return value


HeadChoice = Annotated[
    Annotated[Literal["all"], Tag("<name>")]
    | Annotated[tuple[LayerIndex, ...], Field(min_length=1), AfterValidator(refuse_repeats), Tag("<list>")],
    Discriminator(_kind_of_heads),
]


class Back(Section):
    """A fixed distance: Skip-Layer Attention where it is for some heads."""

    back: Count
    """Each depth reads from the one so many depths before it, if there is attention at both."""


class ShareRule(Section):
    """Which depths read keys and values of an earlier depth, by a rule."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    from_: Annotated[
        Annotated[Literal["first_loop", "pairs"], Tag("<name>")] | Annotated[Back, Tag("<back>")],
        Discriminator(_kind_of_from),
        BeforeValidator(_not_the_last_loop),
        Field(alias="from"),
    ]
    """`first_loop`: every depth of a later loop reads from the depth at the same place of the first; `pairs`: of each
    two neighbours the second reads from the first; `{back: N}`: each depth reads from the one N before it."""
    heads: HeadChoice = "all"
    """Key-value heads that are read (counted from 0); the others stay the depth's own."""


class ShareEntry(Section):
    """One depth that reads keys and values of an earlier one."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    depth: LayerIndex
    """The depth that reads (source layers, counted from 0)."""
    from_: Annotated[LayerIndex, Field(alias="from")]
    """The earlier depth whose keys and values are read: those it makes itself, whatever it reads in turn."""
    heads: HeadChoice = "all"
    """Key-value heads that are read (counted from 0); the others stay the depth's own, or are read by another entry."""


ShareKv = Annotated[
    Annotated[ShareRule, Tag("<rule>")] | Annotated[tuple[ShareEntry, ...], Field(min_length=1), Tag("<list>")],
    Discriminator(_kind_of_share),
]
