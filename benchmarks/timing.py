"""Timings of contenders in one process: interleaved rounds, medians with their spread, ratios within rounds."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

ROUNDS = 5
"""Least number of rounds for a median."""


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Timings:
    """Seconds of each contender, round by round."""

    seconds: Mapping[str, list[float]]

    @property
    def rounds(self) -> int:
        return min(len(values) for values in self.seconds.values())

    def spread(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def best(self, name: str) -> float:
        return min(self.seconds[name])

    def ratio(self, name: str, over: str) -> Spread:
        """Returns the ratios within each round, in which a slow round cancels."""
        return Spread.of([a / b for a, b in zip(self.seconds[name], self.seconds[over], strict=True)])

    def best_ratio(self, name: str, over: str) -> float:
        """Returns the ratio of the fastest rounds, with the least disturbance by the machine."""
        return self.best(name) / self.best(over)


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = ROUNDS,
    *,
    warmups: int = 1,
    seconds: float = 0.0,
    prepare: Callable[[], object] = lambda: None,
    settle: Callable[[], object] = lambda: None,
) -> Timings:
    """Runs all contenders in every round, in reversed order every other round.

    Args:
        contenders: Work to time by name.
        rounds: Least number of rounds; five if it is smaller.
        warmups: Untimed rounds before.
        seconds: Rounds continue until this time is used.
        prepare: Called before each run, outside the timed interval.
        settle: Called before each clock is read, such as `torch.cuda.synchronize`.
    """
    for _ in range(warmups):
        for run in contenders.values():
            prepare()
            run()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    begun = time.perf_counter()
    done = 0
    while done < max(rounds, ROUNDS) or time.perf_counter() - begun < seconds:
        order = list(contenders) if done % 2 == 0 else list(contenders)[::-1]
        for name in order:
            prepare()
            settle()
            start = time.perf_counter()
            contenders[name]()
            settle()
            taken[name].append(time.perf_counter() - start)
        done += 1
    return Timings(taken)
