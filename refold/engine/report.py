"""Counts and times of an engine, and the state of its memory."""

from dataclasses import dataclass, field

from refold.engine.channel import Traffic


@dataclass
class Statistics:
    """Counts and times since the engine began.

    Attributes:
        launches: Passes through a segment.
        launched_tokens: Tokens of all of them.
        mixed_launches: Launches with rows at several depths.
        new_tokens: Tokens that came out.
        depths: Number of depths to the tokens that left there.
        model_seconds: Time in the model: segments, exits and the head.
        sampling_seconds: Time of draws.
        other_seconds: Time of everything else: scheduling, pages and tokens.
    """

    launches: int = 0
    launched_tokens: int = 0
    mixed_launches: int = 0
    new_tokens: int = 0
    depths: dict[int, int] = field(default_factory=dict)
    model_seconds: float = 0.0
    sampling_seconds: float = 0.0
    other_seconds: float = 0.0


@dataclass(frozen=True)
class EngineReport:
    """The state of an engine.

    Attributes:
        counts: Launches, tokens and times.
        used_pages: Pages that sequences or shared prefixes hold.
        free_pages: Pages that nobody holds.
        memory_bytes: Bytes of all pages and states.
        weight_bytes: Bytes of the weights in memory.
        traffic: Bytes to and from attention workers.
        waiting: Sequences without a row.
        running: Sequences with a row.
        preemptions: Times a sequence gave its row back.
        longest_wait: Most launches that a ready row has watched.
        acceptance: Share of drafted tokens that were accepted.
        slots: First depth of a segment to the running sequences that stand before it.
        adapter_bytes: Bytes of further adapters, which are among those of the weights.
    """

    counts: Statistics
    used_pages: int
    free_pages: int
    memory_bytes: int
    weight_bytes: int
    traffic: Traffic
    waiting: int
    running: int
    preemptions: int
    longest_wait: int
    acceptance: float
    slots: dict[int, int] = field(default_factory=dict)
    adapter_bytes: int = 0

    @property
    def mean_depths(self) -> float:
        """Mean number of depths that new tokens ran."""
        total = sum(self.counts.depths.values())
        return sum(depth * count for depth, count in self.counts.depths.items()) / total if total else 0.0

    @property
    def overhead(self) -> float:
        """Share of the time that is spent outside the model."""
        counts = self.counts
        outside = counts.sampling_seconds + counts.other_seconds
        whole = outside + counts.model_seconds
        return outside / whole if whole else 0.0
