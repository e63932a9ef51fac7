"""The section `width`: narrower MLPs and attention with fewer heads."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from refold.blueprint.origins import ErrorMetric
from refold.fields import Count, Real, Section


def _list_or_share(value: Any) -> str:
    return "<list>" if isinstance(value, (list, tuple)) else "<share>"


Counts = Annotated[tuple[Count, ...], Field(min_length=1)]
ShareOrCounts = Annotated[
    Annotated[Annotated[Real, Field(gt=0, le=1)], Tag("<share>")] | Annotated[Counts, Tag("<list>")],
    Discriminator(_list_or_share),
]


class Width(Section):
    """Drops MLP neurons and key-value heads inside of layers, and refits what stays: `down_proj` and `o_proj` take over
    the outputs of the dropped units as far as the kept ones predict them on calibration text."""

    mlp: ShareOrCounts | None = None
    """MLP neurons that stay: a share such as 0.8, or one number for each source layer. Entries of layers without an MLP
    are ignored; a tied MLP takes the entry of its first layer, and its layers lose the same neurons."""
    heads: ShareOrCounts | None = None
    """Key-value heads that stay, each with all query heads that read it: a share, rounded down to at least one head, or
    one number for each source layer, as for `mlp`."""
    split: Literal["even", "measured"] = "even"
    """Division of the shares. `even`: the same share in every layer. `measured`: the parameters that the shares keep
    are divided among layers, and between MLPs and heads, so that the predicted loss is least. A pool without a share
    stays whole."""
    multiple: Count = 32
    """Neurons are rounded down to a multiple of this number, to at least one multiple; listed numbers stay as they
    are. Number formats with blocks of 32 inputs and fast kernels want multiples of 32 or 64."""
    weight: ErrorMetric | None = None
    """Error metric that chooses units: `activations`, the outputs on calibration text; `fisher`, the effect on the
    loss; `none`, by the norms of their weights, and nothing is refitted. Default: as `factor.weight` or
    `relax.weight`, else `activations`."""

    @model_validator(mode="after")
    def _has_an_amount(self) -> "Width":
        given = {name: getattr(self, name) for name in ("mlp", "heads") if getattr(self, name) is not None}
        if not given:
            raise ValueError("mlp or heads is required (got neither); give a share, such as mlp: 0.8")
        listed = [name for name, value in given.items() if isinstance(value, tuple)]
        if self.split == "measured" and listed:
            raise ValueError(f"split: measured divides shares ({listed[0]} is a list); give a share, or remove split")
        return self
