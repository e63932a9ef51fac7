"""Workloads of a bench: prompts, numbers of new tokens and times of arrival."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Job(NamedTuple):
    """One request of a workload.

    Attributes:
        index: Its place in the workload.
        arrival: Seconds from the beginning of the workload to its arrival.
        prompt: Token ids.
        num_new: Number of new tokens; end tokens are ignored.
    """

    index: int
    arrival: float
    prompt: tuple[int, ...]
    num_new: int


@dataclass(frozen=True)
class Workload:
    """Requests that every contender answers.

    Attributes:
        jobs: Requests, in order of arrival.
        rows: Maximal number of requests that run at the same time.
    """

    jobs: tuple[Job, ...]
    rows: int

    @property
    def num_new(self) -> int:
        """Number of new tokens of all requests."""
        return sum(job.num_new for job in self.jobs)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest request, new tokens included."""
        return max(len(job.prompt) + job.num_new for job in self.jobs)


def equal_lengths(prompts: "Prompts", count: int, prompt_tokens: int, num_new: int, rows: int) -> Workload:
    """Returns requests of one length that all come at once."""
    return Workload(
        tuple(Job(index, 0.0, prompts.take(prompt_tokens), num_new) for index in range(count)),
        rows,
    )


def mixed_lengths(prompts: "Prompts", count: int, prompt_tokens: int, num_new: int, rows: int) -> Workload:
    """Returns requests that all come at once, with lengths drawn evenly between a quarter and 7/4 of the given ones."""

    def draw(mean: int) -> int:
        return prompts.numbers.randint(max(1, mean // 4), longest_of(mean))

    return Workload(
        tuple(Job(index, 0.0, prompts.take(draw(prompt_tokens)), draw(num_new)) for index in range(count)), rows
    )


def longest_of(mean: int) -> int:
    """Returns the largest length that `mixed_lengths` draws."""
    return max(1, mean + 3 * mean // 4)


def poisson_arrivals(workload: Workload, rate: float, seed: int) -> Workload:
    """Returns the requests with exponential gaps between them, the arrivals of a Poisson process.

    Args:
        workload: The requests.
        rate: Mean number of arrivals per second.
        seed: Seed of the gaps.
    """
    numbers, now, jobs = random.Random(seed), 0.0, []
    for job in workload.jobs:
        now += numbers.expovariate(rate)
        jobs.append(job._replace(arrival=now))
    return Workload(tuple(jobs), workload.rows)


class Prompts:
    """Prompts of any length: pieces of a text, or random tokens.

    Args:
        seed: Seed of the draws.
        vocab_size: Number of tokens to draw from.
        text: Token ids of a text to cut prompts from; None: random tokens.
        skipped: Number of first token ids that are not drawn at random, because they are often special.
    """

    def __init__(self, seed: int, vocab_size: int, text: Sequence[int] | None = None, skipped: int = 3):
        self.numbers = random.Random(seed)
        self._vocab_size, self._text, self._skipped = vocab_size, text, skipped

    def take(self, count: int) -> tuple[int, ...]:
        """Returns the tokens of the next prompt."""
        if self._text is None:
            first = min(self._skipped, self._vocab_size - 1)
            return tuple(self.numbers.randrange(first, self._vocab_size) for _ in range(count))
        start = self.numbers.randrange(max(1, len(self._text) - count))
        return tuple(self._text[start : start + count])
