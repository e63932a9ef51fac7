"""The `drop` section of a recipe: whole layers, token mixers or MLPs to drop."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from refold.fields import Amount, LayerIndex, Real, Section, refuse_repeats

LayerList = Annotated[tuple[LayerIndex, ...], Field(min_length=1), AfterValidator(refuse_repeats)]
DropBy = Literal["even", "similarity", "auto"]


class Dropping(Section):
    """Parts to drop: exactly one amount, and the rule that chooses the parts."""

    count: LayerIndex | None = None
    """Number of parts to drop."""
    share: Annotated[Real, Field(ge=0, le=1)] | None = None
    """Share of parts to drop, rounded to a whole number, half to even."""
    by: DropBy = "even"
    """Rule that chooses the parts. `even`: the kept parts are evenly spaced, first and last included. `similarity`: the
    parts that change the residual stream least are dropped, measured by `refold analyse` or on calibration text
    (LLM-Drop, arXiv 2406.15786; ShortGPT, arXiv 2403.03853). `auto`: `similarity` if there are measurements or text,
    else `even`."""

    @property
    def is_listed(self) -> bool:
        """Whether the recipe lists the layers."""
        return False

    @model_validator(mode="after")
    def _one_amount(self) -> "Dropping":
        amounts = [name for name in type(self).model_fields if name != "by"]
        given = [name for name in amounts if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(amounts)} is required (got {', '.join(given) or 'none'})")
        return self


class PartDrop(Dropping):
    """Parts of one kind to drop: exactly one of `count`, `share` and `layers`."""

    layers: LayerList | None = None
    """Source layers whose part is dropped."""

    @property
    def is_listed(self) -> bool:
        return self.layers is not None


class BlockDrop(PartDrop):
    """Whole layers to drop."""

    parameters: Amount | None = None
    """Budget of non-embedding parameters, such as 500M: as many whole layers as possible are kept."""


class SublayerDrop(Dropping):
    """Token mixers and MLPs to drop, chosen together by their influence."""

    by: DropBy = "similarity"
    """As for `drop.block`, but with the default `similarity`."""
    parameters: Amount | None = None
    """Budget of non-embedding parameters before layers are tied: as few parts as possible are dropped."""


class Drop(Section):
    """Drops parts of the stack together with their norms."""

    block: BlockDrop | None = None
    """Whole layers, dropped before layers are tied."""
    attention: PartDrop | None = None
    """Token mixers of the layers that remain."""
    mlp: PartDrop | None = None
    """MLPs of the layers that remain."""
    sublayers: SublayerDrop | None = None
    """Token mixers and MLPs together, of the layers that remain, instead of `attention` and `mlp`."""

    @model_validator(mode="after")
    def _one_way(self) -> "Drop":
        if self.sublayers is not None and (self.attention is not None or self.mlp is not None):
            raise ValueError("sublayers: cannot stand beside attention or mlp (got both); remove one of them")
        return self

    @property
    def by_influence(self) -> frozenset[DropBy]:
        """The rules of the section that need a measurement: `similarity`, `auto`, or both."""
        every: tuple[Dropping | None, ...] = (self.block, self.attention, self.mlp, self.sublayers)
        return frozenset(each.by for each in every if each and not each.is_listed and each.by != "even")
