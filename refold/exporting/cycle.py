"""Strict cycles: stacks that run one block of stored layers several times, with nothing that a single depth owns."""

from dataclasses import dataclass

from refold.blueprint.schema import Blueprint, depth_coefficients
from refold.exporting.target import Obstacle
from refold.exporting.unrolled import describe_depths, kept_depths


@dataclass(frozen=True)
class Cycle:
    """A block of layers that runs `num_loops` times."""

    depths: tuple[int, ...]
    """The depths of the first run of the block."""
    num_loops: int

    @property
    def num_layers(self) -> int:
        return len(self.depths)


def find_cycle(blueprint: Blueprint) -> Cycle:
    """Returns the shortest block whose repetition is the whole stack; without any sharing, the stack runs once.

    Depths without parts, such as layers that a fold drops, do not count.
    """
    kept = kept_depths(blueprint)
    stack = [blueprint.depths[index] for index in kept]
    runs = [(depth.mixer, depth.mlp, depth.window, depth.rope) for depth in stack]
    for length in range(1, len(runs)):
        if len(runs) % length == 0 and runs == runs[:length] * (len(runs) // length):
            return Cycle(kept[:length], len(runs) // length)
    return Cycle(kept, 1)


def cycle_obstacles(blueprint: Blueprint) -> list[Obstacle]:
    """Returns the reasons why a stack is no strict cycle of native layers."""
    found: list[Obstacle] = []
    kept = kept_depths(blueprint)
    if find_cycle(blueprint).num_loops == 1:
        is_tied = len(blueprint.mixers) < len(kept) or len(blueprint.mlps) < len(kept)
        got = "only some depths are tied" if is_tied else "each depth has its own weights"
        change = "fold.uneven=drop without fold.prelude and fold.coda" if is_tied else "fold.loops=2"
        found.append(Obstacle("one block of layers that runs several times", got, change))
    stack = [(index, blueprint.depths[index]) for index in kept]
    own = [
        ("LoRAs", "no relax section", [index for index, depth in stack if depth.ranks]),
        ("own norms or biases", "relax.vectors=tied", [index for index, depth in stack if depth.vectors == "own"]),
        ("gains", "relax.gain=tied", [index for index, depth in stack if depth.gain == "own"]),
        ("coefficients", "factor.share=none", [index for index, _ in stack if depth_coefficients(blueprint, index)]),
    ]
    for what, change, depths in own:
        if depths:
            got = f"{what} at {describe_depths(depths)}"
            found.append(Obstacle("depths without tensors of their own", got, change))
    for what, pool in (("attention", "mixer"), ("MLP", "mlp")):
        depths = [index for index, depth in stack if getattr(depth, pool) is None]
        if depths:
            got = f"no {what} at {describe_depths(depths)}"
            found.append(Obstacle("attention and an MLP at every depth", got, "no drop"))
    return found
