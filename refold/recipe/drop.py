"""The `drop` section of a recipe: whole layers, token mixers or MLPs to drop."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from refold.fields import Amount, LayerIndex, Real, Section, refuse_repeats
from refold.recipe.fold import list_or_name

LayerList = Annotated[tuple[LayerIndex, ...], Field(min_length=1), AfterValidator(refuse_repeats)]
DropBy = Literal["even", "similarity", "auto"]
Replace = Annotated[
    Annotated[Literal["none", "linear"], Tag("<name>")] | Annotated[LayerList, Tag("<list>")],
    Discriminator(list_or_name),
]


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
    replace: Replace = "none"
    """`linear`: a linear map in place of the dropped parts, solved on calibration text and folded into the output
    projection of the part before them (ReplaceMe, arXiv 2505.02819), so that it adds no weights. Where an output norm
    stands behind that projection, the map is one factor for each channel and goes into the norm. Parts that are dropped
    beside each other share one map, also those that are dropped with `none`. Beside `layers`, a list of some of them:
    only these are replaced."""

    @property
    def is_listed(self) -> bool:
        """Whether the recipe lists the layers."""
        return False

    def replaces(self, layer: int) -> bool:
        """Returns whether a linear map stands in for the part of a layer, if the part is dropped."""
        return self.replace == "linear" or (isinstance(self.replace, tuple) and layer in self.replace)

    @model_validator(mode="after")
    def _one_amount(self) -> "Dropping":
        amounts = [name for name in type(self).model_fields if name not in ("by", "replace")]
        given = [name for name in amounts if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(amounts)} is required (got {', '.join(given) or 'none'})")
        if isinstance(self.replace, tuple):
            listed = getattr(self, "layers", None) or ()
            other = next((layer for layer in self.replace if layer not in listed), None)
            if other is not None:
                raise ValueError(
                    f"replace: layers that `layers` lists are required (got {other}); list it there too, or write "
                    f"replace: linear for all dropped parts"
                )
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
        return frozenset(each.by for each in self._sections if not each.is_listed and each.by != "even")

    @property
    def replaces(self) -> bool:
        """Whether linear maps stand in for any dropped parts."""
        return any(each.replace != "none" for each in self._sections)

    @property
    def _sections(self) -> tuple[Dropping, ...]:
        every: tuple[Dropping | None, ...] = (self.block, self.attention, self.mlp, self.sublayers)
        return tuple(each for each in every if each is not None)
