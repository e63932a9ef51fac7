"""The mixer of each depth, by the recipe's `mixers`, with all checks against the source."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refold.errors import RecipeError
from refold.families.arch import ArchSpec, Rope
from refold.mixers.attention import Attention
from refold.mixers.placement import Every, MixerEntry
from refold.mixers.registry import require_module
from refold.mixers.spec import Carried, MixerSpec
from refold.recipe.recipe import Recipe

ATTENTION = Attention()


@dataclass(frozen=True)
class ChosenMixer:
    """The mixer of one depth.

    Attributes:
        mixer: The mixer, resolved against the source.
        transfers: Names of the linears taken over from the source's layer; None: all, for the source's own attention.
        window: Number of tokens that a token attends to; None: all, or a recurrent state.
        rope: The rotary embedding; None: no rotation.
    """

    mixer: MixerSpec = ATTENTION
    transfers: tuple[str, ...] | None = None
    window: int | None = None
    rope: Rope | None = None

    @property
    def signature(self) -> Hashable:
        """The properties that depths must have in common to share a stored mixer."""
        return self.mixer, self.transfers

    @property
    def has_fresh_mlp(self) -> bool:
        """Whether the MLP of the depth is fresh."""
        return self.transfers is not None and "mlp" not in self.transfers


def choose_mixers(recipe: Recipe, arch: ArchSpec) -> tuple[ChosenMixer, ...]:
    """Returns the mixer of every depth.

    Raises:
        RecipeError: A depth is out of range or named twice, a mixer does not fit this source, or a linear in
            `transfer` does not fit the mixer.
    """
    chosen = [ChosenMixer(window=layer.window, rope=layer.rope) for layer in arch.layers]
    taken: dict[int, int] = {}
    for index, entry in enumerate(recipe.mixers):
        where = f"mixers[{index}]"
        kept = set(_select(entry.except_, arch.num_layers, f"{where}.except"))
        depths = [depth for depth in _select(entry.depths, arch.num_layers, f"{where}.depths") if depth not in kept]
        if not depths:
            raise RecipeError(f"{where}.depths: at least one depth is required (none is left after `except`)")
        for depth in depths:
            if depth in taken:
                raise RecipeError(
                    f"{where}.depths: depth {depth} has a mixer from mixers[{taken[depth]}] already; name it in "
                    f"`except` of one of them"
                )
            taken[depth] = index
            chosen[depth] = _choose(entry, arch, depth, where, is_fresh=recipe.weights == "fresh")
    return tuple(chosen)


def _choose(entry: MixerEntry, arch: ArchSpec, depth: int, where: str, is_fresh: bool) -> ChosenMixer:
    layer, given = arch.layers[depth], entry.mixer()
    require_module(given)
    mixer = given.resolve(arch, where)
    window, rope = given.looks_back(layer.window), layer.rope if mixer.is_rotary else None
    if mixer.is_native:
        return ChosenMixer(mixer, None, window, rope)
    carried, transfers = mixer.carried(arch), entry.transfers()
    known = {each.group for each in carried.values()}
    for each in carried.values():
        if each.group in transfers and each.misfit and not is_fresh:
            fitting = [name for name in transfers if _fits(name, carried, known)]
            raise RecipeError(
                f"{where}.transfer: {each.group} cannot be carried over to {mixer.type} ({each.misfit}); leave it "
                f"out to start it fresh: transfer: [{', '.join(fitting)}]"
            )
    return ChosenMixer(mixer, transfers, window, rope)


def describe_lost_norms(arch: ArchSpec, chosen: Sequence[ChosenMixer]) -> tuple[str, ...]:
    """Returns a note for each mixer that takes over queries or keys of the source, but not their norms."""
    lost: dict[str, str] = {}
    for each in chosen:
        taken = [name for name in ("q_proj", "k_proj") if name in (each.transfers or ())]
        if arch.qk_norm != "none" and taken and "q_norm.weight" not in each.mixer.carried(arch):
            lost[each.mixer.type] = " and ".join(taken)
    return tuple(
        f"mixers: {name} takes over {taken} without the source's query/key norms, so their scale changes"
        for name, taken in lost.items()
    )


def _fits(name: str, carried: Mapping[str, Carried], known: set[str]) -> bool:
    return name not in known or not any(each.group == name and each.misfit for each in carried.values())


def _select(choice: Any, num_layers: int, where: str) -> tuple[int, ...]:
    if choice == "all":
        return tuple(range(num_layers))
    if choice == "xatl":
        if num_layers < 4:
            raise RecipeError(f"{where}: xatl requires at least 4 layers (got {num_layers}); list the depths")
        return tuple(dict.fromkeys((1, num_layers // 2 - 1)))
    if isinstance(choice, Every):
        return tuple(range(choice.start, num_layers, choice.every))
    for depth in choice:
        if depth >= num_layers:
            raise RecipeError(f"{where}: depth {depth} is out of range ({num_layers} depths: 0..{num_layers - 1})")
    return tuple(choice)
