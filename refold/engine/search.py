"""Search for the thresholds of all exits that keep a tolerance together."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch

from refold.engine.exit_table import Documents, ExitTable, document_batches, run_skipping
from refold.engine.exits import ExitRule
from refold.engine.risk import DocumentLosses, documents_needed, search_in_order, upper_bound
from refold.engine.thresholds import ExitThreshold, make_rule
from refold.modeling.model import RefoldForCausalLM

GRID = tuple(1 - 10 ** float(place) for place in np.linspace(-5, -0.05, 253))
"""Candidate thresholds, from strict to lax."""

Places = tuple[int | None, ...]
"""For each exit the place of its threshold in `GRID`; None: no token leaves there."""


class Promise(NamedTuple):
    """The statement to prove.

    Attributes:
        tolerance: Largest mean share of differing tokens.
        delta: Probability with which it may be exceeded.
    """

    tolerance: float
    delta: float

    def part(self, count: int) -> "Promise":
        """Returns one of `count` equal parts."""
        return Promise(self.tolerance / count, self.delta / count)


class Effect(NamedTuple):
    """Thresholds with their effect on the calibration documents.

    Attributes:
        exits: Thresholds of all exits.
        skewed: Share of tokens that run the full depth and differ, because they read propagated keys.
    """

    exits: tuple[ExitThreshold, ...]
    skewed: float


class ThresholdSearch(ABC):
    """Finds thresholds and measures their effect.

    Args:
        table: Confidences and errors of the calibration documents.
        measure: Measure of confidence.
    """

    def __init__(self, table: ExitTable, measure: str):
        self.table, self._measure = table, measure

    @abstractmethod
    def choose(self, promise: Promise) -> tuple[Places, tuple[str, ...]]:
        """Returns the laxest places that keep a promise about all exits, and a note for each exit without one."""

    @abstractmethod
    def effect(self, places: Places, promise: Promise) -> Effect:
        """Returns the thresholds at places with their measured effect."""

    def rule(self, places: Places) -> ExitRule:
        """Returns the rule of the thresholds at places."""
        return make_rule(self._measure, self.thresholds(places))

    def thresholds(self, places: Places) -> dict[int, float | None]:
        """Returns the threshold by the number of depths before each exit."""
        limits = [None if place is None else GRID[place] for place in places]
        return dict(zip(self.table.depths, limits, strict=True))

    def _explain(self, where: str, losses: DocumentLosses, promise: Promise) -> str:
        needed = documents_needed(*promise)
        if len(losses) < needed:
            return (
                f"{where}: no token leaves, because {len(losses)} documents are too few to promise "
                f"{promise.tolerance:.3g} with confidence {1 - promise.delta:.3g}; at least {needed} are needed, even "
                f"if no token differs"
            )
        return (
            f"{where}: no token leaves, because even at confidence {GRID[0]:.5g} up to "
            f"{upper_bound(losses, promise.delta):.3g} of the tokens may differ (at most {promise.tolerance:.3g} are "
            f"allowed); raise the tolerance, give more documents, or heal with the objective `exits`"
        )

    def _threshold(self, index: int, place: int | None, leaving: np.ndarray, wrong: np.ndarray) -> ExitThreshold:
        """Returns the threshold of one exit, without a bound."""
        here = leaving == index
        return ExitThreshold(
            depths=self.table.depths[index],
            threshold=None if place is None else GRID[place],
            leaves=float(self.table.by_document(here).mean()),
            differs=float(self.table.by_document(here & wrong).mean()),
            bound=None,
        )


class ExactSearch(ThresholdSearch):
    """The search where skipped depths have exact keys and values, so that a token's exit changes no other token."""

    def choose(self, promise: Promise) -> tuple[Places, tuple[str, ...]]:
        # `agreement` never lets a token leave at the first exit, which then needs no part of the tolerance.
        usable = [index for index, sure in enumerate(self.table.confidences) if sure.any()]
        part = promise.part(max(1, len(usable)))
        places: list[int | None] = [None] * len(self.table.depths)
        notes = []
        for index in usable:
            losses = partial(self.table.losses, index)
            passed = search_in_order(GRID, losses, part.tolerance, part.delta)
            if passed is None:
                notes.append(self._explain(f"exit after {self.table.depths[index]}", losses(GRID[0]), part))
            else:
                places[index] = passed.place
        return tuple(places), tuple(notes)

    def effect(self, places: Places, promise: Promise) -> Effect:
        rule = self.rule(places)
        leaving = self.table.leaving(rule.thresholds)
        wrong = self.table.differs[leaving, np.arange(self.table.num_tokens)] & (leaving >= 0)
        usable = sum(bool(sure.any()) for sure in self.table.confidences)
        part = promise.part(max(1, usable))
        exits = []
        for index, place in enumerate(places):
            found = self._threshold(index, place, leaving, wrong)
            if place is not None:
                bound = upper_bound(self.table.losses(index, GRID[place]), part.delta)
                found = found.model_copy(update={"bound": bound})
            exits.append(found)
        return Effect(tuple(exits), 0.0)


class SkippingSearch(ThresholdSearch):
    """The search where skipped depths make keys and values from the stream at the exit.

    A token's exit then changes the later tokens, and every threshold costs a pass over the documents. One threshold
    serves all exits, so that the thresholds have an order from strict to lax.

    Args:
        table: As above.
        measure: As above.
        model: The model.
        documents: The documents of the table.
    """

    PLACES = (52, 104, 156, 180, 196, 208, 220, 228, 236, 244, 252)
    """The places of `GRID` that are tried; lax ones are denser, because most models stop among them."""

    def __init__(self, table: ExitTable, measure: str, model: RefoldForCausalLM, documents: Documents):
        super().__init__(table, measure)
        self._model, self._documents = model, documents
        # Several tolerances test the same strict thresholds.
        self._pass = lru_cache(maxsize=len(self.PLACES) + 1)(self._run)

    def choose(self, promise: Promise) -> tuple[Places, tuple[str, ...]]:
        grid = [GRID[place] for place in self.PLACES]
        passed = search_in_order(grid, self._losses, promise.tolerance, promise.delta)
        if passed is None:
            return (None,) * len(self.table.depths), (self._explain("exits", self._losses(grid[0]), promise),)
        return (self.PLACES[passed.place],) * len(self.table.depths), ()

    def effect(self, places: Places, promise: Promise) -> Effect:
        limits = self.rule(places).thresholds
        if not any(place is not None for place in places):
            leaving = self.table.leaving(limits)
            return Effect(tuple(self._threshold(index, None, leaving, leaving >= 0) for index in range(len(places))), 0)
        tokens, leaving = self._pass(tuple(limits.items()))
        wrong = tokens != self.table.full
        bound = upper_bound(self.table.by_document(wrong), promise.delta)
        exits = [self._threshold(index, place, leaving, wrong) for index, place in enumerate(places)]
        skewed = float(self.table.by_document(wrong & (leaving < 0)).mean())
        return Effect(tuple(each.model_copy(update={"bound": bound}) for each in exits), skewed)

    def _losses(self, threshold: float) -> DocumentLosses:
        limits = tuple((depth, threshold) for depth in self.table.depths)
        return self.table.by_document(self._pass(limits)[0] != self.table.full)

    def _run(self, limits: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
        """Returns token and exit of each token of the table."""
        tokens, leaving = [], []
        for batch in document_batches(self._documents):
            found = run_skipping(self._model, batch.input_ids.to(self._model.device), self._measure, dict(limits))
            tokens.append(found.tokens.cpu()[batch.is_token])
            leaving.append(found.leaving.cpu()[batch.is_token])
        return torch.cat(tokens).numpy(), torch.cat(leaving).numpy()
