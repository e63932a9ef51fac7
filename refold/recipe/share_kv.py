"""The `share_kv` section of a recipe: depths that read keys and values of an earlier depth."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from refold.fields import Count, LayerIndex, Section, refuse_repeats

URLS: Mapping[str, str] = {
    "first_loop": "https://arxiv.org/abs/2507.10524",
    "pairs": "https://arxiv.org/abs/2405.12981",
    "back": "https://arxiv.org/abs/2406.11274",
}
"""The papers: recursion-wise sharing (Mixture-of-Recursions), Cross-Layer Attention, Skip-Layer Attention."""


def _kind_of_heads(value: Any) -> str:
    return "<list>" if isinstance(value, (list, tuple)) else "<name>"


def _kind_of_from(value: Any) -> str:
    return "<back>" if isinstance(value, (dict, Back)) else "<name>"


def _kind_of_share(value: Any) -> str:
    return "<list>" if isinstance(value, (list, tuple)) else "<rule>"


def _not_the_last_loop(value: Any) -> Any:
    if value == "last_loop":
        raise ValueError(
            "must be first_loop, pairs or {back: N} (got 'last_loop': an earlier loop would need keys and values that "
            "the last loop computes later; this is possible in decoding, but not in training and prefill)"
        )
    return value


HeadChoice = Annotated[
    Annotated[Literal["all"], Tag("<name>")]
    | Annotated[tuple[LayerIndex, ...], Field(min_length=1), AfterValidator(refuse_repeats), Tag("<list>")],
    Discriminator(_kind_of_heads),
]


class Back(Section):
    """A fixed distance between depths; with some `heads` only, this is Skip-Layer Attention."""

    back: Count
    """Distance N: each depth reads from the depth N before it, if both have attention."""


class ShareRule(Section):
    """A rule that selects the depths that read keys and values of an earlier depth."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    from_: Annotated[
        Annotated[Literal["first_loop", "pairs"], Tag("<name>")] | Annotated[Back, Tag("<back>")],
        Discriminator(_kind_of_from),
        BeforeValidator(_not_the_last_loop),
        Field(alias="from"),
    ]
    """`first_loop`: every depth of a later loop reads from the depth at the same place in the first loop. `pairs`: of
    each two neighbours the second reads from the first. `{back: N}`: each depth reads from the depth N before it."""
    heads: HeadChoice = "all"
    """Key-value heads that are read (counted from 0); the depth computes all other heads itself."""


class ShareEntry(Section):
    """One depth that reads keys and values of an earlier depth."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    depth: LayerIndex
    """The depth that reads (source layers, counted from 0)."""
    from_: Annotated[LayerIndex, Field(alias="from")]
    """The earlier depth whose own keys and values are read, even if that depth reads from another one too."""
    heads: HeadChoice = "all"
    """Key-value heads that are read (counted from 0); other heads are computed by the depth or read by another
    entry."""


ShareKv = Annotated[
    Annotated[ShareRule, Tag("<rule>")] | Annotated[tuple[ShareEntry, ...], Field(min_length=1), Tag("<list>")],
    Discriminator(_kind_of_share),
]
