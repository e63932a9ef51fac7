"""The notes of a plan: facts, advice and pending measurements for its reader."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from refold.blueprint.schema import Blueprint, DepthSpec
from refold.families.arch import Frozen
from refold.recipe.recipe import Recipe

NoteKind = Literal["fact", "ranks", "pending"]


class Note(Frozen):
    """One line of text for the reader of a plan.

    Attributes:
        kind: `fact`: always valid; `ranks`: valid for the ranks in the recipe; `pending`: valid until the measurement
            that the note names.
    """

    kind: NoteKind = "fact"
    text: str

    def __str__(self) -> str:
        return self.text


def _as_note(value: Any) -> Any:
    # Earlier versions wrote notes as strings, without a kind.
    return {"text": value} if isinstance(value, str) else value


Notes = tuple[Annotated[Note, BeforeValidator(_as_note)], ...]


def notes(lines: Iterable[str], kind: NoteKind = "fact") -> Notes:
    """Returns lines as notes of one kind."""
    return tuple(Note(kind=kind, text=line) for line in lines)


_SETTING = "Gemma 2B, two loops, 15B tokens, few-shot accuracy in the paper"
_STRICT = {"average": 46.7, "lower": 47.1, "random": 37.6}
_RELAXED = {("stepwise", "svd"): 50.5, ("average", "zero"): 49.0, ("lower", "svd"): 53.2, ("lower", "zero"): 49.5}


def advise(recipe: Recipe, relaxed: bool) -> tuple[str, ...]:
    """Returns advice for choices that were worse than others in the paper's measurements.

    Args:
        recipe: The resolved recipe.
        relaxed: Whether the target has LoRAs.
    """
    fold, relax = recipe.fold, recipe.lora
    if fold is None or fold.loops in (None, 1) or recipe.weights == "fresh" or recipe.shares_bases:
        return ()
    init = fold.init if isinstance(fold.init, str) else ""
    if not relaxed or relax is None:
        if init in _STRICT:
            return (f"fold.init: {init} without LoRAs had {_STRICT[init]}, stepwise 51.7 ({_SETTING})",)
        return ()
    measured = _RELAXED.get((init, relax.init or ""))
    if measured is None:
        return ()
    better = "stepwise + zero 53.1, average + svd 55.5" if init == "stepwise" else "average + svd 55.5"
    return (f"fold.init, relax.init: {init} + {relax.init} had {measured} at rank 512, {better} ({_SETTING})",)


def describe_reach(blueprint: Blueprint) -> tuple[str, ...]:
    """Returns a note if depths that share a mixer have different windows or ropes; nothing otherwise."""
    tied = [users for part in range(len(blueprint.mixers)) if len(users := blueprint.users("mixer", part)) > 1]
    mixed: list[tuple[int, int]] = []
    for first, *others in tied:
        other = next((each for each in others if _reach(blueprint, each) != _reach(blueprint, first)), None)
        if other is not None:
            mixed.append((first, other))
    if not mixed:
        return ()
    first, other = (blueprint.depths[index] for index in mixed[0])
    is_local = (first.window is None) != (other.window is None)
    who = "a local and a global depth share weights" if is_local else "depths of different reach share weights"
    told = f"depth {mixed[0][0]} {_tell(first)}, depth {mixed[0][1]} {_tell(other)}"
    return (
        f"{who} in {len(mixed)} of {len(tied)} tied mixers ({told}): each depth keeps its own window and rope, but the "
        f"weights must suit both",
    )


def _reach(blueprint: Blueprint, index: int) -> tuple:
    return blueprint.depths[index].window, blueprint.depths[index].rope


def _tell(depth: DepthSpec) -> str:
    seen = "sees all tokens" if depth.window is None else f"sees {depth.window:,} tokens"
    return seen if depth.rope is None else f"{seen} with rope base {depth.rope.theta:,.0f}"
