"""What every entry of a recipe's `mixers` has: which mixer, at which depths, and what of the source it takes over."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag

from refold.fields import Count, LayerIndex, Section, refuse_repeats

TRANSFERS = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp")
"""What `transfer` can name."""
XATL_TRANSFER = ("o_proj", "mlp")
"""What Cross-Architecture Transfer Learning takes over besides embeddings, head and norms."""


class Every(Section):
    """Depths at regular distances."""

    every: Count
    """Every n-th depth."""
    start: LayerIndex = 0
    """The first of them."""


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


class MixerSwap(Section):
    """Replaces the attention of some depths by another mixer."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    type: str
    """Which mixer."""
    depths: Depths = "all"
    """Depths (source layers, counted from 0) that get it: `all`, a list, `{every: 4}`, or `xatl`: 1 and L/2-1."""
    except_: Annotated[Depths, Field(alias="except")] = ()
    """Depths of those that keep the source's attention; `xatl` is what that paper keeps: 1 and L/2-1 of L layers."""
    transfer: Transfer = XATL_TRANSFER
    """What is taken over from the source's layer besides its norms: `all`, or some of `q_proj`, `k_proj`, `v_proj`,
    `o_proj` and `mlp`. What is not named starts fresh; what is named must fit."""

    def options(self) -> dict[str, Any]:
        """Returns what is the mixer's own: every field but those all entries have."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in MixerSwap.model_fields}

    def looks_back(self, source_window: int | None) -> int | None:
        """Returns how many tokens its depths look back to, whatever the source does; None: all, or its state knows."""
        return None

    def transfers(self) -> tuple[str, ...]:
        """Returns what is taken over, by name."""
        return TRANSFERS if isinstance(self.transfer, str) else self.transfer
