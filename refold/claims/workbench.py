"""The workbench of a run: every arm once, with its readings, in an order in which bases come first."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from refold.claims.arm_maker import ArmMaker, ArmResult, ArmRun
from refold.claims.claim import Claim, ClaimArm, ClaimNotRun, Reading
from refold.claims.evidence import Samples
from refold.claims.forecast import ArmWork, Pace
from refold.claims.record import ArmRecord
from refold.errors import RecipeError
from refold.progress import Report, Show, describe_duration


class Workbench:
    """Makes the arms of claims, and gives their readings to the measurements.

    Args:
        maker: Makes arms.
        claims: The claims to run.
        show: Shows the progress.
        options: Things that only some claims read, by name, such as the folder of few-shot tasks.

    Attributes:
        refused: Reason by name of each claim whose arms do not fit the source.
    """

    def __init__(self, maker: ArmMaker, claims: Sequence[Claim], show: Show, options: dict[str, Any] | None = None):
        self.maker, self.show, self.options = maker, show, options or {}
        self.refused: dict[str, str] = {}
        self._keys: dict[int, str] = {}
        self._arms: dict[str, ClaimArm] = {}
        self._rates: dict[str, float | None] = {}
        self._tried: dict[str, dict[str, float]] = {}
        self._results: dict[str, list[ArmResult]] = {}
        for claim in claims:
            try:
                keys = {id(arm): maker.planner.arm_key(arm) for arm in claim.arms}
            except RecipeError as error:
                self.refused[claim.name] = str(error)
                continue
            self._keys |= keys
            for arm in claim.arms:
                self._arms.setdefault(keys[id(arm)], arm)
        self._bases = {self._keys[id(arm.base)] for arm in self._arms.values() if arm.base is not None}

    @property
    def scale(self) -> Any:
        """The scale of the run."""
        return self.maker.planner.scale

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the texts."""
        return tuple(domain.name for domain in self.maker.texts.domains)

    @property
    def source(self) -> Any:
        """The source, as scorecards take it."""
        return self.maker.planner.model.source

    def require(self, name: str, advice: str) -> Any:
        """Returns an option that a measurement reads.

        Raises:
            ClaimNotRun: It was not given; the message is the advice.
        """
        found = self.options.get(name)
        if found is None:
            raise ClaimNotRun(advice)
        return found

    @property
    def arms(self) -> tuple[ClaimArm, ...]:
        """All arms, each once, bases first."""
        return tuple(self._arms.values())

    def works(self, pace: Pace) -> list[ArmWork]:
        """Returns the trainings and measurements of every arm."""
        text = sum(domain.documents.num_tokens for domain in self.maker.texts.domains)
        return [ArmWork.of(arm, self.maker.planner, pace, text) for arm in self.arms]

    def run(self, works: Sequence[ArmWork], report: Report) -> None:
        """Makes all arms, whose works are given; results of earlier calls are taken over."""
        left, done = sum(work.seconds for work in works), 0
        num_runs, spent, expected = sum(work.num_runs for work in works), 0.0, 0.0
        for arm, work in zip(self.arms, works, strict=True):
            for run in self._runs(arm):
                started, is_new = time.perf_counter(), self.maker.find(run, self._base_rates(arm)) is None
                result = self._make(run)
                done, seconds = done + 1, work.seconds_of(run)
                left -= seconds
                report(done, num_runs)
                if not is_new:
                    continue
                took = time.perf_counter() - started
                spent, expected = spent + took, expected + seconds
                # The forecast counts until enough was measured here.
                slower = (spent + seconds) / (expected + seconds)
                self.show.say(
                    f"[{done} of {num_runs}] {_describe(run)}: {result.validation:.4f} bits per byte on validation "
                    f"text, {took:.0f} s; about {describe_duration(max(0.0, left * slower) / 3600)} left"
                )
            self.maker.forget_start(arm, self.maker.planner.seeds(arm))

    def samples(self, reading: Reading, domain: str) -> Samples:
        """Returns the bits of a reading for every seed and test document of a domain."""
        results = self._results[self._keys[id(reading.arm)]]
        if reading.exit is None:
            amounts = [result.bits[domain] for result in results]
        else:
            amounts = [result.exit_bits[domain][reading.exit] for result in results]
        sizes = next(each.sizes for each in self.maker.texts.domains if each.name == domain)
        return Samples(np.asarray(amounts, dtype=np.float64), sizes)

    def curves(self, arm: ClaimArm) -> list[list[tuple[int, float]]]:
        """Returns the validation curve of every seed."""
        return [result.curve for result in self._results[self._keys[id(arm)]]]

    def folders(self, arm: ClaimArm) -> list[Any]:
        """Returns the model folder of every seed; models that are not there are made again."""
        key = self._keys[id(arm)]
        return [
            self.maker.folder(self._full_run(arm, seed, self._rates[key]), self._base_rates(arm))
            for seed in self.maker.planner.seeds(arm)
        ]

    def costs(self, arm: ClaimArm) -> dict[str, Any]:
        """Returns parameters, bytes and FLOPs of an arm."""
        return self.maker.costs(arm)

    def records(self) -> tuple[ArmRecord, ...]:
        """Returns a record of every arm."""
        planner = self.maker.planner
        found = []
        for key, arm in self._arms.items():
            tried = self._tried[key]
            rate = self._rates[key]
            edges = (f"{planner.rates(arm)[0]:g}", f"{planner.rates(arm)[-1]:g}")
            found.append(
                ArmRecord(
                    name=arm.name,
                    key=key,
                    tokens=planner.tokens(arm),
                    sweep_tokens=len(tried) * planner.sweep_tokens(arm),
                    rates={name: loss if math.isfinite(loss) else None for name, loss in tried.items()},
                    rate=rate,
                    is_edge=rate is not None and f"{rate:g}" in edges,
                    **self.costs(arm),
                )
            )
        return tuple(found)

    @property
    def seconds(self) -> float:
        """Seconds of all trainings and measurements of full length."""
        return sum(result.seconds for results in self._results.values() for result in results)

    def _base_rates(self, arm: ClaimArm) -> list[float]:
        return [self._rates[self._keys[id(base)]] or 0.0 for base in arm.bases]

    def _full_run(self, arm: ClaimArm, seed: int, rate: float | None) -> ArmRun:
        return ArmRun(arm, seed, rate, self.maker.planner.tokens(arm))

    def _runs(self, arm: ClaimArm) -> Iterable[ArmRun]:
        """Yields the trials of an arm, then its runs at the best rate."""
        planner, key = self.maker.planner, self._keys[id(arm)]
        seeds, rate = planner.seeds(arm), None
        self._tried[key], self._results[key] = {}, []
        if arm.heal:
            for tried in planner.rates(arm):
                yield ArmRun(arm, seeds[0], tried, planner.sweep_tokens(arm), is_trial=True)
            losses = self._tried[key]
            best = min(losses, key=lambda each: losses[each])
            rate = next(each for each in planner.rates(arm) if f"{each:g}" == best)
        self._rates[key] = rate
        for seed in seeds:
            yield self._full_run(arm, seed, rate)

    def _make(self, run: ArmRun) -> ArmResult:
        key = self._keys[id(run.arm)]
        result = self.maker.make(run, self._base_rates(run.arm), keep=key in self._bases and not run.is_trial)
        if run.is_trial:
            self._tried[key][f"{run.rate:g}"] = result.validation
        else:
            self._results[key].append(result)
        return result


def _describe(run: ArmRun) -> str:
    if run.rate is None:
        return f"{run.arm.name}, seed {run.seed}" if run.arm.draws else run.arm.name
    return f"{run.arm.name}, {'trial of ' if run.is_trial else ''}rate {run.rate:g}, seed {run.seed}"
