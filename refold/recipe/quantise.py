"""The section `quantise`: weights that are stored as integers."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from refold.blueprint.integers import SCHEMES, SchemeName
from refold.fields import Section
from refold.suggest import must_be_one_of

FLOAT = "float"
"""The format of a weight that is not quantised."""
OUTER_SCHEME = "int8"
"""Default format of embedding and head: they read and decide on every token."""
Rounding = Literal["auto", "plain", "feedback"]


def _known_format(name: str) -> str:
    if name != FLOAT and name not in SCHEMES:
        raise ValueError(must_be_one_of(name, (*SCHEMES, FLOAT)))
    return name


FormatName = Annotated[str, AfterValidator(_known_format)]
"""Name of a scheme, or `float`."""


class Quantise(Section):
    """Stores weights as integers, after conversion or healing."""

    to: SchemeName
    """Scheme of the linears: `int8` (one scale for each output) or `int4` (groups of 32 inputs with a scale and a zero
    point)."""
    keep: Annotated[dict[str, FormatName], Field(default_factory=dict)]
    """Other formats by name: `embeddings`, `head`, the linears of a pool (`mixer`, `mlp`) or one linear (`down_proj`);
    each a scheme or `float`. The more specific name wins. Default for embeddings and head: `int8`."""
    rounding: Rounding = "auto"
    """`plain`: to the nearest integer. `feedback`: the error of each input is corrected by the inputs that are rounded
    after it, on calibration text (GPTQ, arXiv 2210.17323). `auto`: `feedback` where there is text."""
