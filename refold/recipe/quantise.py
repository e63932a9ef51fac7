"""The section `quantise`: weights that are stored as integers."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from refold.blueprint.integers import SCHEMES, SchemeName, must_be_scheme
from refold.fields import Section

FLOAT = "float"
"""The format of a weight that is not quantised."""
OUTER_SCHEME = "int8"
"""Default format of embedding and head: they read and decide on every token."""
Rounding = Literal["auto", "plain", "feedback"]


def _known_format(name: str) -> str:
    if name != FLOAT and name not in SCHEMES:
        raise ValueError(must_be_scheme(name, FLOAT))
    return name


FormatName = Annotated[str, AfterValidator(_known_format)]
"""Name of a scheme, or `float`."""


class Quantise(Section):
    """Stores weights as integers, after conversion or healing."""

    to: SchemeName
    """Scheme of the linears: `int8` has one scale for each output; `int6`, `int5`, `int4`, `int3` and `int2` have one
    for each group of 32 inputs, with `g64` or `g128` behind the name of 64 or 128; `z` before it adds zero points:
    `int3zg64`."""
    keep: Annotated[dict[str, FormatName], Field(default_factory=dict)]
    """Other formats by name: `embeddings`, `head`, the linears of a pool (`mixer`, `mlp`) or one linear (`down_proj`);
    each a scheme or `float`. The more specific name wins. Default for embeddings and head: `int8`."""
    layers: Annotated[dict[str, Annotated[tuple[FormatName, ...], Field(min_length=1)]], Field(default_factory=dict)]
    """Formats by linear (`q_proj`), with one entry for each layer of the source: a scheme or `float`. They win over
    `keep` and `to`. Factors of a linear take its scheme. Entries of dropped layers are ignored; a tied part takes the
    entry of its first layer."""
    rounding: Rounding = "auto"
    """`plain`: to the nearest integer. `feedback`: the error of each input is corrected by the inputs that are rounded
    after it, on calibration text (GPTQ, arXiv 2210.17323). `auto`: `feedback` where there is text."""
