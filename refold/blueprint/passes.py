"""Passes of a stack: the segments between exits and loop borders, and those that can share a launch."""

import itertools
from dataclasses import dataclass
from typing import Any

from refold.blueprint.schema import Blueprint

Kinds = dict[tuple[Any, ...], int]
"""Structure of a segment to the number of its kind."""


@dataclass(frozen=True)
class PassSegment:
    """A range of depths that rows run without a decision in between.

    Attributes:
        depths: The range.
        kind: Number of the segment's kind. Rows at segments of one kind can share a launch, because the depths run the
            same parts and differ only in tensors: LoRA, vectors, gains, coefficients and places of keys.
        is_exit: Whether an exit stands behind its last depth.
    """

    depths: range
    kind: int
    is_exit: bool


@dataclass(frozen=True)
class Passes:
    """All segments of a stack, in the order of execution.

    Attributes:
        segments: Together all depths, or those before an exit.
        period: Number of depths of the repeated block; 0 without one.
        start: First depth of the first run of the block.
        num_loops: Number of runs of the block; 1 without one.
    """

    segments: tuple[PassSegment, ...]
    period: int = 0
    start: int = 0
    num_loops: int = 1

    def name(self, segment: PassSegment) -> str:
        """Returns the place of a segment in words: `prelude`, `loop 2`, `coda` or `stack`."""
        if not self.period:
            return "stack"
        if segment.depths.start < self.start:
            return "prelude"
        loop = (segment.depths.start - self.start) // self.period
        return f"loop {loop + 1}" if loop < self.num_loops else "coda"

    def shared_kinds(self) -> dict[int, tuple[PassSegment, ...]]:
        """Returns the segments of each kind, for kinds of more than one segment."""
        kinds: dict[int, list[PassSegment]] = {}
        for segment in self.segments:
            kinds.setdefault(segment.kind, []).append(segment)
        return {kind: tuple(found) for kind, found in kinds.items() if len(found) > 1}


def find_passes(
    blueprint: Blueprint,
    num_depths: int | None = None,
    cut_at: int | None = None,
    kinds: Kinds | None = None,
    whole: bool = False,
) -> Passes:
    """Cuts a stack into segments.

    The stack is cut behind every exit and at the borders of the block that repeats. A cut inside one run of the block
    is repeated in every other run, so that the runs stay alike.

    Args:
        blueprint: The stack.
        num_depths: Leave the stack after so many depths; None: run all.
        cut_at: Number of depths after which the stack is cut as well; None: no further cut.
        whole: Whether to cut neither behind exits nor at loop borders.
        kinds: Numbers of kinds that other calls have given, to which this call adds; None: numbers of this call alone.
    """
    total = blueprint.num_depths if num_depths is None else num_depths
    forms = [_structure(blueprint, index) for index in range(total)]
    start, period, loops = _repeated_block(forms)
    exits = {index + 1 for index in range(total - 1) if blueprint.depths[index].exit is not None and not whole}
    inner = exits if cut_at is None or cut_at >= total else exits | {cut_at}
    cuts = {0, total, *inner}
    if period and not whole:
        end = start + period * loops
        cuts |= {start + period * loop for loop in range(loops + 1)}
        inside = {(cut - start) % period for cut in inner if start < cut < end}
        cuts |= {start + period * loop + place for loop in range(loops) for place in inside}
    borders = sorted(cuts)
    kinds = {} if kinds is None else kinds
    segments = []
    for begin, stop in itertools.pairwise(borders):
        kind = kinds.setdefault(tuple(forms[begin:stop]), len(kinds))
        segments.append(PassSegment(range(begin, stop), kind, stop in exits))
    return Passes(tuple(segments), period, start, loops)


def describe_passes(blueprint: Blueprint) -> tuple[str, ...]:
    """Returns a line for each segment: its name, its depths, and the segments that it shares launches with."""
    passes = find_passes(blueprint)
    sharing, told = passes.shared_kinds(), []
    for segment in passes.segments:
        first, last = segment.depths.start, segment.depths.stop - 1
        others = [other for other in sharing.get(segment.kind, ()) if other != segment]
        names = ", ".join(f"{other.depths.start}..{other.depths.stop - 1}" for other in others)
        exit_text = ", then an exit" if segment.is_exit else ""
        shares = f"; shares launches with {names}" if names else ""
        told.append(f"{passes.name(segment)}: depths {first}..{last}{exit_text}{shares}")
    return tuple(told)


def recurrent_depths(blueprint: Blueprint) -> tuple[int, ...]:
    """Returns the depths that keep a recurrent state."""
    return tuple(index for index in range(blueprint.num_depths) if blueprint.keeps_state(index))


def last_writing_depth(blueprint: Blueprint) -> int:
    """Returns the last depth that keeps keys or a state; -1 if none does.

    Tokens of a prompt whose prediction nobody asks for need not run past it.
    """
    makes_keys = [index for index in range(blueprint.num_depths) if blueprint.made_heads(index)]
    return max((*makes_keys, *recurrent_depths(blueprint)), default=-1)


def _structure(blueprint: Blueprint, index: int) -> tuple[Any, ...]:
    """Returns everything of a depth that rows of one launch must have in common."""
    depth = blueprint.depths[index]
    return (
        depth.mixer,
        depth.mlp,
        depth.window,
        depth.rope,
        depth.vectors,
        depth.gain,
        bool(depth.prefix),
        blueprint.made_heads(index),
        tuple(read.heads for read in depth.kv),
    )


def _repeated_block(forms: list[tuple[Any, ...]]) -> tuple[int, int, int]:
    """Returns first depth, number of depths and number of runs of the block that covers most of the stack.

    A block counts if its runs cover more than half of the depths; (0, 0, 1) if there is none.
    """
    best, total = (0, 0, 1), len(forms)
    covered = total // 2
    for period in range(1, total // 2 + 1):
        for start in range(total - 2 * period + 1):
            loops = 1
            while forms[start : start + period] == forms[start + period * loops : start + period * (loops + 1)]:
                loops += 1
            if loops > 1 and period * loops > covered:
                best, covered = (start, period, loops), period * loops
    return best
