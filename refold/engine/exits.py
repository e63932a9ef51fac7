"""Live exits: which rows leave the stack early, and the keys and values of the depths that they skip."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from refold.engine.confidence import confidence
from refold.engine.launch import Leaving
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


class Left(NamedTuple):
    """The decision at one exit.

    Attributes:
        leaves: For each row whether it leaves.
        logits: `[n, N]` of the rows that leave, in order; None if none does.
    """

    leaves: list[bool]
    logits: Tensor | None


class LiveExits:
    """Decides at exits.

    Args:
        model: The model.
        rule: Measure and thresholds.
    """

    def __init__(self, model: RefoldForCausalLM, rule: ExitRule):
        self._model, self._rule = model, rule
        self.depths = (
            frozenset(rule.thresholds)
            if rule.replay is None
            else frozenset(depth + 1 for depth in model.model.exit_depths)
        )

    def decide(self, leaving: Leaving) -> Left:
        """Returns the rows that leave at an exit; each span asks for one token.

        With the measure `gate` the head runs for the rows that leave alone, else for all rows.

        Args:
            leaving: Rows behind the exit.
        """
        model, depth, spans = self._model, leaving.depth, leaving.spans
        normed = model.model.norm_after(depth - 1)(leaving.streams)
        if self._rule.replay is not None:
            wanted = [self._rule.replay(span.sequence.request.index, span.sequence.num_new) <= depth for span in spans]
            return self._left(torch.tensor(wanted), normed, depth)
        threshold = self._rule.thresholds[depth]
        if self._rule.measure == "gate":
            parts = model.model.exit_parts(depth - 1)
            assert parts is not None
            assert parts.gate is not None
            sure = confidence("gate", parts.gate(normed), None)
            return self._left(sure >= threshold, normed, depth)
        logits = model.project_logits(normed, depth - 1)
        previous = torch.tensor([span.previous for span in spans], device=logits.device)
        sure = confidence(self._rule.measure, logits, previous)
        if self._rule.measure == "agreement":
            for span, token in zip(spans, logits.argmax(-1).tolist(), strict=True):
                span.previous = token
        leaves = sure >= threshold
        wanted = leaves.tolist()
        return Left(wanted, logits[leaves] if any(wanted) else None)

    def _left(self, leaves: Tensor, normed: Tensor, depth: int) -> Left:
        wanted = leaves.tolist()
        if not any(wanted):
            return Left(wanted, None)
        chosen = normed if all(wanted) else normed[leaves.to(normed.device)]
        return Left(wanted, self._model.project_logits(chosen, depth - 1))
