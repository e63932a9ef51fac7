"""Choice of llama.cpp's architecture for a model: the one that keeps most of its saving."""

from dataclasses import dataclass

from refold.blueprint.cost import count_parameters
from refold.blueprint.owned.registry import OWNED
from refold.blueprint.part_sizes import head_counts, neuron_counts
from refold.blueprint.schema import Blueprint
from refold.exporting.gguf.contents import GgufContents
from refold.exporting.gguf.hybrid_file import has_state_space, hybrid_contents, hybrid_obstacles
from refold.exporting.gguf.layouts import find_layout
from refold.exporting.gguf.looped_file import looped_contents, looped_obstacles
from refold.exporting.gguf.unrolled_file import DECI, pruned_contents, unrolled_contents, unrolled_obstacles
from refold.exporting.target import Obstacle, Verdict, impossible

MOST_OVERHEAD = 1.02
"""A file with at most this many times the numbers of the model keeps its saving."""


@dataclass(frozen=True)
class GgufChoice:
    """The contents of a model's file, or the reasons why no architecture holds the model.

    Attributes:
        contents: The contents; None: llama.cpp cannot hold the model.
        obstacles: The reasons, for the architecture that comes closest.
        changes: Changes in the recipe with which tied weights would stay tied in the file.
    """

    contents: GgufContents | None
    obstacles: tuple[Obstacle, ...] = ()
    changes: tuple[str, ...] = ()


def choose_contents(blueprint: Blueprint) -> GgufChoice:
    """Chooses the architecture of a model's file.

    `nanbeige` for strict cycles, `granitehybrid` for Mamba-2, `deci` for dropped attention or MLPs and layers of
    different widths, else the dense
    architecture of the source's family.
    """
    looped = looped_obstacles(blueprint)
    if not looped:
        return GgufChoice(looped_contents(blueprint))
    if has_state_space(blueprint):
        found = hybrid_obstacles(blueprint)
        return GgufChoice(None, tuple(found)) if found else GgufChoice(hybrid_contents(blueprint))
    is_uneven = any((depth.mixer is None) != (depth.mlp is None) for depth in blueprint.depths)
    is_uneven |= len(head_counts(blueprint)) > 1 or len(neuron_counts(blueprint)) > 1
    if is_uneven and not unrolled_obstacles(blueprint, DECI):
        return GgufChoice(pruned_contents(blueprint), changes=_changes(blueprint, looped))
    layout = find_layout(blueprint.arch.family)
    if layout is None:
        return GgufChoice(None, (Obstacle("a family that llama.cpp has", blueprint.arch.family, ""),))
    found = unrolled_obstacles(blueprint, layout)
    if found:
        return GgufChoice(None, tuple(found))
    return GgufChoice(unrolled_contents(blueprint, layout), changes=_changes(blueprint, looped))


def judge_contents(blueprint: Blueprint) -> Verdict:
    """Returns the verdict of the target `gguf`."""
    choice = choose_contents(blueprint)
    if choice.contents is None:
        return impossible(list(choice.obstacles))
    contents = choice.contents
    architecture = f"architecture {contents.architecture}"
    lost = tuple(sentence for kind in OWNED for sentence in kind.lost(blueprint))
    sentences = (*contents.notes, *lost)
    if contents.num_elements <= MOST_OVERHEAD * count_parameters(blueprint).total:
        return Verdict("kept", (architecture, *sentences))
    return Verdict("larger", (f"{architecture}: weights are repeated or multiplied out", *sentences), choice.changes)


def _changes(blueprint: Blueprint, looped: list[Obstacle]) -> tuple[str, ...]:
    """Returns the changes with which a model with tied weights would be a `nanbeige` file."""
    runs = sum((depth.mixer is not None) + (depth.mlp is not None) for depth in blueprint.depths)
    if runs <= len(blueprint.mixers) + len(blueprint.mlps) or not all(each.change for each in looped):
        return ()
    return tuple(dict.fromkeys(each.change for each in looped))
