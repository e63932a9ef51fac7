"""Live exits: which rows leave the stack early, and the keys and values of the depths that they skip."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from refold.engine.confidence import confidence
from refold.engine.launch import Leaving
from refold.errors import RefoldError
from refold.modeling.model import RefoldForCausalLM


@dataclass(frozen=True)
class ExitRule:
    """The rule by which tokens leave.

    Attributes:
        measure: Name of a confidence measure.
        thresholds: Number of depths before an exit to the confidence from which on tokens leave there; exits without
            one are passed.
        replay: Function of the number of a request and the place of a new token to the number of depths after which
            the token leaves, whatever the confidence: for benchmarks that repeat recorded exits; None: thresholds.
    """

    measure: str
    thresholds: Mapping[int, float]
    replay: Callable[[int, int], int] | None = None


@dataclass(frozen=True)
class ExitLevels:
    """The rules of one measure for several tolerances.

    Attributes:
        measure: Name of the measure.
        own: Rule of requests that ask for no tolerance; None: they run the full depth.
        tolerance: The tolerance of that rule; None: it has none, or there is no rule.
        rules: Tolerance to rule, smallest tolerance first; empty: requests cannot ask for a tolerance.
    """

    measure: str
    own: ExitRule | None
    tolerance: float | None = None
    rules: Mapping[float, ExitRule] = field(default_factory=dict)

    def find(self, tolerance: float | None) -> ExitRule | None:
        """Returns the rule for a tolerance: that of the largest calibrated tolerance that is not above it.

        Args:
            tolerance: What a request asks for; None: the own rule.

        Returns:
            None: the full depth, because every calibrated tolerance is larger.

        Raises:
            RefoldError: A tolerance above 0 is asked for, and the exits have none.
        """
        if tolerance is None:
            return self.own
        if tolerance and not self.rules:
            raise RefoldError(
                f"exit_tolerance: calibrated exits are required (got {tolerance:g} for exits by a rule without a "
                f"tolerance); run `refold calibrate`"
            )
        return max(((each, rule) for each, rule in self.rules.items() if each <= tolerance), default=(0, None))[1]


class Left(NamedTuple):
    """The decision at one exit.

    Attributes:
        leaves: For each row whether it leaves.
        logits: `[n, N]` of the rows that leave, in order; None if none does.
    """

    leaves: list[bool]
    logits: Tensor | None


class LiveExits:
    """Decides at exits, for each row by the rule of its request.

    Args:
        model: The model.
        measure: Name of the confidence measure of all rules.
    """

    def __init__(self, model: RefoldForCausalLM, measure: str):
        self._model, self._measure = model, measure
        self._depths = frozenset(depth + 1 for depth in model.model.exit_depths)

    def looks_at(self, rule: ExitRule | None, depth: int) -> bool:
        """Says whether a rule may let a token leave after so many depths."""
        if rule is None:
            return False
        return depth in (self._depths if rule.replay is not None else rule.thresholds)

    def decide(self, leaving: Leaving) -> Left:
        """Returns the rows that leave at an exit; each span asks for one token.

        With the measure `gate` the head runs for the rows that leave alone, else for all rows.

        Args:
            leaving: Rows behind the exit, whose rules look at it.
        """
        model, depth, spans = self._model, leaving.depth, leaving.spans
        normed = model.model.norm_after(depth - 1)(leaving.streams)
        rules = [rule for span in spans if (rule := span.sequence.request.exits) is not None]
        assert len(rules) == len(spans)
        if rules[0].replay is not None:
            wanted = [
                rule.replay is not None and rule.replay(span.sequence.request.index, span.sequence.num_new) <= depth
                for span, rule in zip(spans, rules, strict=True)
            ]
            return self._left(torch.tensor(wanted), normed, depth)
        limits = torch.tensor([rule.thresholds[depth] for rule in rules])
        if self._measure == "gate":
            parts = model.model.exit_parts(depth - 1)
            assert parts is not None
            assert parts.gate is not None
            sure = confidence("gate", parts.gate(normed), None)
            return self._left(sure >= limits.to(sure), normed, depth)
        logits = model.project_logits(normed, depth - 1)
        previous = torch.tensor([span.previous for span in spans], device=logits.device)
        sure = confidence(self._measure, logits, previous)
        if self._measure == "agreement":
            for span, token in zip(spans, logits.argmax(-1).tolist(), strict=True):
                span.previous = token
        leaves = sure >= limits.to(sure)
        wanted = leaves.tolist()
        return Left(wanted, logits[leaves] if any(wanted) else None)

    def _left(self, leaves: Tensor, normed: Tensor, depth: int) -> Left:
        wanted = leaves.tolist()
        if not any(wanted):
            return Left(wanted, None)
        chosen = normed if all(wanted) else normed[leaves.to(normed.device)]
        return Left(wanted, self._model.project_logits(chosen, depth - 1))
