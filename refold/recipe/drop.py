"""What a recipe can say about leaving out: whole layers, token mixers, MLPs."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from refold.fields import Amount, LayerIndex, Real, Section, refuse_repeats

LayerList = Annotated[tuple[LayerIndex, ...], Field(min_length=1), AfterValidator(refuse_repeats)]
DropBy = Literal["even", "similarity", "auto"]


class Dropping(Section):
    """How much is left out, and how it is chosen: exactly one of the amounts is given."""

    count: LayerIndex | None = None
    """How many are left out."""
    share: Annotated[Real, Field(ge=0, le=1)] | None = None
    """Share that is left out, rounded to whole ones, half to even."""
    by: DropBy = "even"
    """How they are chosen. `even`: those to keep are evenly spaced, first and last included. `similarity`: those go
    that change the stream least, as `refold analyse` or calibration text says (LLM-Drop, arXiv 2406.15786; ShortGPT,
    arXiv 2403.03853). `auto`: `similarity` where there are measurements or text, else `even`."""

    @property
    def is_listed(self) -> bool:
        """Whether the recipe itself says which ones."""
        return False

    @model_validator(mode="after")
    def _one_amount(self) -> "Dropping":
        amounts = [name for name in type(self).model_fields if name != "by"]
        given = [name for name in amounts if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(amounts)} is required (got {', '.join(given) or 'none'})")
        return self


class PartDrop(Dropping):
    """Which parts are left out: exactly one of the amounts says how many, or which."""

    layers: LayerList | None = None
    """Source layers that lose it."""

    @property
    def is_listed(self) -> bool:
        return self.layers is not None


class BlockDrop(PartDrop):
    """Which whole layers are left out."""

    parameters: Amount | None = None
    """Keep as many whole layers as fit into this number of non-embedding parameters, such as 500M."""


class SublayerDrop(Dropping):
    """How many of all token mixers and MLPs are left out, whichever matter least."""

    by: DropBy = "similarity"
    """As for `drop.block`, but `similarity` unless you say otherwise."""
    parameters: Amount | None = None
    """Leave out as few as bring the rest within this number of non-embedding parameters, before anything is tied."""


class Drop(Section):
    """What is left out of the stack. The norms of what is left out go with it."""

    block: BlockDrop | None = None
    """Whole layers, before anything is tied."""
    attention: PartDrop | None = None
    """Token mixers, of the depths that remain."""
    mlp: PartDrop | None = None
    """MLPs, of the depths that remain."""
    sublayers: SublayerDrop | None = None
    """Token mixers and MLPs jointly, of the depths that remain, instead of `attention` and `mlp`."""

    @model_validator(mode="after")
    def _one_way(self) -> "Drop":
        if self.sublayers is not None and (self.attention is not None or self.mlp is not None):
            raise ValueError("sublayers: attention and mlp must be left out beside it (got both ways); choose one")
        return self

    @property
    def by_influence(self) -> frozenset[DropBy]:
        """The ways to choose that follow from measurement, of those it uses."""
        every: tuple[Dropping | None, ...] = (self.block, self.attention, self.mlp, self.sublayers)
        return frozenset(each.by for each in every if each and not each.is_listed and each.by != "even")
