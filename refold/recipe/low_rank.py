"""The section `factor`: linears that are stored as two factors of lower rank."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from refold.blueprint.origins import ErrorMetric
from refold.fields import Count, Real, Section

Split = Literal["even", "measured"]


def _kind_of_entry(value: object) -> str:
    return "<full>" if isinstance(value, str) else "<number>"


ListedRank = Annotated[
    Annotated[Count, Tag("<number>")] | Annotated[Literal["full"], Tag("<full>")], Discriminator(_kind_of_entry)
]


class Factor(Section):
    """Stores linears as two factors of lower rank, as SVD-LLM does (arXiv 2403.07378), with or without a fold."""

    parameters: Annotated[Real, Field(gt=0)] | None = None
    """Budget for all linear weights of the target, LoRAs included, as a share of the source's linear weights, such as
    0.6. Exactly one of `parameters` and `ranks` is required."""
    ranks: Annotated[dict[str, Annotated[tuple[ListedRank, ...], Field(min_length=1)]] | None, Field(min_length=1)] = (
        None
    )
    """Ranks by linear (`q_proj`), with one entry for each layer of the source: a rank, or `full` for the whole matrix.
    Ranks are capped at the smaller side. Linears that are not listed stay whole. Entries of dropped layers are ignored;
    a tied part takes the entry of its first layer."""
    share: Literal["none", "basis"] = "none"
    """`basis`: for linears that `fold` ties, one input-side factor A is stored, and each depth has its own output-side
    factor B, `y = B (A x)` (Basis Sharing, arXiv 2410.03765). Each depth then has its own norms and biases too, unless
    `relax.vectors` says otherwise. Untied linears are stored as two factors."""
    split: Split = "even"
    """Division of the budget. `even`: every stored linear keeps the same share of its parameters. `measured`: the ranks
    that lower the error most, or the whole matrix if that is better. With `relax.rank: {split: measured}` also each
    tied linear is tested: if tying does not pay, its depths get their own factors."""
    floor: Annotated[Real, Field(ge=0, le=1)] = 0.0
    """With `split: measured`, the smallest rank of a linear as a share of its even rank, such as 0.5. Ranks dealt by
    error alone can starve a linear whose error the measurement underrates. 0: no floor."""
    multiple: Count = 1
    """Ranks above this number are rounded down to a multiple of it. Formats with blocks of 32 inputs want multiples of
    32."""
    weight: ErrorMetric | None = None
    """Error metric: `none`, the weights; `activations`, the outputs on calibration text; `fisher`, the effect on the
    loss. Default: as `relax.weight` or `width.weight`, else `activations`."""

    @model_validator(mode="after")
    def _one_amount(self) -> "Factor":
        given = [name for name in ("parameters", "ranks") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of parameters, ranks is required (got {' and '.join(given) or 'neither'})")
        if self.ranks is not None:
            fields = type(self).model_fields
            for name in ("share", "split", "floor", "multiple"):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"{name}: requires parameters (got ranks, which are listed already); remove it")
        if self.floor and self.split != "measured":
            raise ValueError(f"floor: requires split: measured (got {self.split}); remove floor")
        return self
