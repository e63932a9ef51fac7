"""The unrolled stack: each depth of a blueprint as a layer of a stock model of the source's family; torch-free."""

import math
from collections.abc import Sequence

from refold.blueprint.cost import count_parameters
from refold.blueprint.owned.registry import OWNED
from refold.blueprint.part_sizes import head_counts, neuron_counts, widest_arch
from refold.blueprint.schema import Blueprint, DepthSpec
from refold.blueprint.source_tensors import source_tensors
from refold.errors import ExportError, SourceError
from refold.exporting.target import Obstacle, Verdict, impossible
from refold.families.arch import ArchSpec, Layer
from refold.families.registry import find_family


def describe_depths(depths: Sequence[int]) -> str:
    """Returns sorted depths as `depth 3` or `depths 0, 2..4, 6..11`."""
    runs: list[list[int]] = []
    for depth in depths:
        if runs and runs[-1][-1] == depth - 1:
            runs[-1].append(depth)
        else:
            runs.append([depth])
    listed = ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"depth{'s' if len(depths) > 1 else ''} {listed}"


def kept_depths(blueprint: Blueprint) -> tuple[int, ...]:
    """Returns the depths that have a part, in order: the layers of the export."""
    return tuple(
        index for index, depth in enumerate(blueprint.depths) if depth.mixer is not None or depth.mlp is not None
    )


def without_adapters(blueprint: Blueprint) -> Blueprint:
    """Returns the stack without its LoRAs."""
    depths = tuple(depth.model_copy(update={"ranks": {}}) for depth in blueprint.depths)
    return blueprint.model_copy(update={"depths": depths})


def dense_obstacles(blueprint: Blueprint) -> list[Obstacle]:
    """Returns the properties of a model that no unrolled stock model of its family has."""
    found = []
    foreign = {
        index: blueprint.mixers[depth.mixer].mixer.type
        for index, depth in enumerate(blueprint.depths)
        if depth.mixer is not None and not blueprint.mixers[depth.mixer].mixer.is_native
    }
    if foreign:
        named = ", ".join(
            f"{describe_depths([index for index, each in foreign.items() if each == name])}: {name}"
            for name in dict.fromkeys(foreign.values())
        )
        found.append(Obstacle("attention at every depth", f"got {named}", "no mixers"))
    reader = next((index for index, depth in enumerate(blueprint.depths) if depth.kv), None)
    if reader is not None:
        got = f"depth {reader} reads those of depth {blueprint.depths[reader].kv[0].depth}"
        found.append(Obstacle("keys and values of its own at every depth", got, "no share_kv"))
    for kind in OWNED:
        obstacle = kind.obstacle(blueprint)
        if obstacle is not None:
            found.append(Obstacle(*obstacle, f"no {kind.field}"))
    if not kept_depths(blueprint):
        found.append(Obstacle("a depth with a mixer or an MLP", "all are dropped", "fewer drops"))
    return found


def width_obstacles(blueprint: Blueprint) -> list[Obstacle]:
    """Returns the sizes that differ between depths, for formats whose layers all have the same."""
    sizes = {"key-value heads": head_counts(blueprint), "neurons": neuron_counts(blueprint)}
    return [
        Obstacle(f"the same number of {what} at every depth", f"got {', '.join(map(str, counts))}", "width.split=even")
        for what, counts in sizes.items()
        if len(counts) > 1
    ]


def dense_arch(blueprint: Blueprint) -> ArchSpec:
    """Returns the architecture of the unrolled stack, in which every layer has the sizes of the widest.

    Raises:
        ExportError: No depth has a part; or a depth has another mixer than attention, reads keys and values of another
            depth, or owns tensors that no stock model has, such as a prefix.
    """
    for obstacle in dense_obstacles(blueprint):
        raise ExportError(
            f"export: {obstacle.required} is required by {blueprint.arch.family} ({obstacle.got}); keep the folder"
        )
    depths = [blueprint.depths[index] for index in kept_depths(blueprint)]
    # A depth without attention takes window and rope of a depth with attention.
    mixing = next((depth for depth in depths if depth.mixer is not None), depths[0])
    layers = tuple(_layer(depth if depth.mixer is not None else mixing) for depth in depths)
    return widest_arch(blueprint).model_copy(update={"layers": layers})


def count_dense_bytes(blueprint: Blueprint, number_bytes: int) -> int:
    """Returns the bytes of weights of the unrolled stack."""
    arch = dense_arch(blueprint)
    tensors = source_tensors(arch, find_family(arch.family)).values()
    return number_bytes * sum(math.prod(each.shape) for each in tensors)


def judge_unrolled(blueprint: Blueprint) -> Verdict:
    """Returns the verdict of a target that stores each depth as a layer of the source's family."""
    obstacles = dense_obstacles(blueprint)
    if obstacles:
        return impossible(obstacles)
    try:
        find_family(blueprint.arch.family).write_config(dense_arch(blueprint))
    except SourceError as error:
        return Verdict("impossible", (str(error),))
    lost = tuple(sentence for kind in OWNED for sentence in kind.lost(blueprint))
    own, unrolled = count_parameters(blueprint).total, count_dense_bytes(blueprint, 1)
    if unrolled <= own:
        return Verdict("kept", lost)
    return Verdict("larger", (*_repeated(blueprint), *lost))


def _repeated(blueprint: Blueprint) -> list[str]:
    """Returns sentences about the weights that the unrolled stack stores although the model does not."""
    found = []
    parts = len(blueprint.mixers) + len(blueprint.mlps)
    runs = sum((depth.mixer is not None) + (depth.mlp is not None) for depth in blueprint.depths)
    if runs > parts:
        found.append("tied weights are repeated")
    if any(part.factors or part.bases for part in (*blueprint.mixers, *blueprint.mlps)):
        found.append("low-rank factors are multiplied out")
    for counts, what in ((head_counts(blueprint), "attention"), (neuron_counts(blueprint), "MLPs")):
        if len(counts) > 1:
            found.append(f"narrower {what} are padded with zeros to the widest ({counts[0]} to {counts[-1]})")
    for name, word in (("mixer", "attention"), ("mlp", "MLP")):
        if any(getattr(blueprint.depths[index], name) is None for index in kept_depths(blueprint)):
            found.append(f"a dropped {word} is stored as zeros")
    return found


def _layer(depth: DepthSpec) -> Layer:
    return Layer(window=depth.window, rope=depth.rope)
