"""Interleaved times of contenders at several lengths."""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial

from timing import Spread, interleave

SAMPLE_SECONDS = 0.05
"""Short work is repeated until a sample lasts about so long."""
Key = tuple[str, int]
"""A contender and its number of tokens."""


class Clock:
    """Interleaved times of contenders in seconds per run; short work is repeated within a sample.

    Args:
        contenders: The work to time; each runs once before.
        rounds: Number of rounds, at least five.
        once: Work that is too slow for rounds; it runs once after them.
        settle: Called before each clock is read, such as `torch.cuda.synchronize`.
    """

    def __init__(
        self,
        contenders: Mapping[Key, Callable[[], object]],
        rounds: int,
        once: Mapping[Key, Callable[[], object]] | None = None,
        settle: Callable[[], object] = lambda: None,
    ):
        repeated, self.repeats = {}, {}
        for key, run in contenders.items():
            seconds = _seconds(run, settle)
            if seconds < SAMPLE_SECONDS:
                seconds = _seconds(run, settle)  # the first run may have set things up
            self.repeats[key] = math.ceil(SAMPLE_SECONDS / seconds)
            repeated[key] = partial(_repeat, run, self.repeats[key])
        timings = interleave({_say(key): run for key, run in repeated.items()}, rounds, warmups=0, settle=settle)
        self.seconds = {
            key: [seconds / count for seconds in timings.seconds[_say(key)]] for key, count in self.repeats.items()
        }
        self.once = {key: _seconds(run, settle) for key, run in (once or {}).items()}

    def ms(self, key: Key) -> str:
        seconds = self.once[key] if key in self.once else Spread.of(self.seconds[key]).median
        return f"{seconds * 1e3:,.{3 if seconds < 0.001 else 1 if seconds < 0.1 else 0}f}"

    def ratio(self, key: Key, over: Key) -> Spread:
        """Returns the ratios within rounds, or the ratio to the single run of slow work."""
        base = [self.once[over]] * len(self.seconds[key]) if over in self.once else self.seconds[over]
        return Spread.of([mine / other for mine, other in zip(self.seconds[key], base, strict=True)])


def _seconds(run: Callable[[], object], settle: Callable[[], object]) -> float:
    settle()
    begun = time.perf_counter()
    run()
    settle()
    return time.perf_counter() - begun


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def _say(key: Key) -> str:
    return f"{key[0]} at {key[1]}"
