"""Entries of a recipe's `mixers`: the options of a mixer, its depths, and the linears transferred to it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, create_model

from refold.fields import Count, LayerIndex, Section, refuse_repeats
from refold.mixers.registry import MIXERS, tagged_union
from refold.mixers.spec import MixerSpec

TRANSFERS = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp")
"""The names that `transfer` accepts."""
XATL_TRANSFER = ("o_proj", "mlp")
"""The linears that Cross-Architecture Transfer Learning takes over besides embeddings, head and norms."""


class Every(Section):
    """Depths at regular distances."""

    every: Count
    """Distance n: every n-th depth."""
    start: LayerIndex = 0
    """The first depth."""


def _kind_of_depths(value: Any) -> str:
    if isinstance(value, (dict, Every)):
        return "<every>"
    return "<list>" if isinstance(value, (list, tuple)) else "<name>"


def _kind_of_transfer(value: Any) -> str:
    return "<list>" if isinstance(value, (list, tuple)) else "<name>"


Listed = Annotated[tuple[LayerIndex, ...], AfterValidator(refuse_repeats), Tag("<list>")]
Depths = Annotated[
    Annotated[Literal["all", "xatl"], Tag("<name>")] | Listed | Annotated[Every, Tag("<every>")],
    Discriminator(_kind_of_depths),
]
Transfer = Annotated[
    Annotated[Literal["all"], Tag("<name>")]
    | Annotated[
        tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "mlp"], ...],
        AfterValidator(refuse_repeats),
        Tag("<list>"),
    ],
    Discriminator(_kind_of_transfer),
]


class MixerEntry(Section):
    """Replaces the attention of some depths by another mixer."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)
    mixer_class: ClassVar[type[MixerSpec]]
    """The mixer whose options the entry also holds."""

    depths: Depths = "all"
    """Depths (source layers, counted from 0) that get the mixer: `all`, a list, `{every: 4}`, or `xatl`: 1 and L/2-1
    of L layers."""
    except_: Annotated[Depths, Field(alias="except")] = ()
    """Exceptions: depths that keep the source's attention. `xatl` is the choice of the paper: 1 and L/2-1 of L."""
    transfer: Transfer = XATL_TRANSFER
    """Linears taken over from the source's layer, besides its norms: `all`, or some of `q_proj`, `k_proj`, `v_proj`,
    `o_proj` and `mlp`. All other linears are fresh. A linear in the list must fit."""

    def mixer(self) -> MixerSpec:
        """Returns the mixer with the options of the entry, not yet resolved."""
        given = {name: getattr(self, name) for name in self.mixer_class.model_fields}
        return self.mixer_class.model_validate(given)

    def transfers(self) -> tuple[str, ...]:
        """Returns the names of the linears that are taken over."""
        return TRANSFERS if isinstance(self.transfer, str) else self.transfer


def _entry_class(mixer: type[MixerSpec]) -> type[MixerEntry]:
    """Makes the recipe section of a mixer: the placement fields and the mixer's own fields."""
    placed = MixerEntry.model_fields["transfer"]
    default = "all" if mixer.transfers_all else placed.default
    entry: Any = create_model(
        f"{mixer.__name__}Entry",
        __base__=(MixerEntry, mixer),
        __doc__=mixer.__doc__,
        transfer=(Transfer, default),
    )
    entry.mixer_class = mixer
    return entry


ENTRIES: Mapping[str, type[MixerEntry]] = {name: _entry_class(mixer) for name, mixer in MIXERS.items()}
"""The recipe section of every mixer, by its `type`."""

if TYPE_CHECKING:
    AnyEntry = MixerEntry
else:
    AnyEntry = tagged_union(ENTRIES)
