"""Exits in generation: the engine follows the full depth's own continuations and counts other tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from refold.engine.engine import Engine
from refold.engine.exits import ExitRule
from refold.engine.settings import EngineSettings, KvPolicy
from refold.engine.thresholds import LiveShares
from refold.generation.sampling import Sampling
from refold.modeling.model import RefoldForCausalLM

TokenIds = Sequence[int]


class Followed(NamedTuple):
    """Predictions along one continuation.

    Attributes:
        tokens: The predicted token at each place.
        depths: Number of depths that predicted it.
    """

    tokens: Sequence[int]
    depths: Sequence[int]


class LiveRunner(ABC):
    """Generates with exits."""

    @abstractmethod
    def go_on(self, prompts: Sequence[TokenIds], num_tokens: int) -> list[tuple[int, ...]]:
        """Returns the greedy continuations at full depth, which end early at an end token."""

    @abstractmethod
    def follow(
        self, prompts: Sequence[TokenIds], continuations: Sequence[TokenIds], rule: ExitRule, kv: KvPolicy
    ) -> list[Followed]:
        """Returns the predictions with exits, where each continuation goes on whatever is predicted."""


class EngineRunner(LiveRunner):
    """Generates by the engine.

    Args:
        model: A model with exits.
    """

    def __init__(self, model: RefoldForCausalLM):
        self._model = model

    def go_on(self, prompts: Sequence[TokenIds], num_tokens: int) -> list[tuple[int, ...]]:
        found = Engine(self._model).generate([list(prompt) for prompt in prompts], Sampling(max_new_tokens=num_tokens))
        return [result.choices[0].token_ids for result in found]

    def follow(
        self, prompts: Sequence[TokenIds], continuations: Sequence[TokenIds], rule: ExitRule, kv: KvPolicy
    ) -> list[Followed]:
        engine = Engine(self._model, EngineSettings(exits=rule, kv=kv))
        requests = [
            engine.prepare(list(prompt), forced=list(continuation))
            for prompt, continuation in zip(prompts, continuations, strict=True)
        ]
        for request in requests:
            engine.submit(request)
        while engine.has_work:
            engine.step()
        return [Followed(request.predicted[0], engine.take(request).choices[0].depths) for request in requests]


class LiveCheck:
    """Follows the same continuations with any thresholds.

    Args:
        runner: Generates.
        prompts: Beginnings of documents.
        num_tokens: New tokens of each, at most.
        num_depths: Depths of the stack.
    """

    def __init__(self, runner: LiveRunner, prompts: Sequence[TokenIds], num_tokens: int, num_depths: int):
        self._runner, self._num_depths = runner, num_depths
        found = runner.go_on(prompts, num_tokens)
        kept = [(prompt, tokens) for prompt, tokens in zip(prompts, found, strict=True) if len(tokens)]
        self._prompts, self._continuations = [each for each, _ in kept], [tokens for _, tokens in kept]

    def shares(self, rule: ExitRule, kv: KvPolicy) -> LiveShares | None:
        """Returns the measured shares; None if every continuation is empty."""
        if not self._prompts:
            return None
        followed = self._runner.follow(self._prompts, self._continuations, rule, kv)
        leaves = [np.mean(np.array(each.depths) < self._num_depths) for each in followed]
        pairs = zip(followed, self._continuations, strict=True)
        differs = [np.mean(np.array(each.tokens) != np.array(tokens)) for each, tokens in pairs]
        return LiveShares(
            documents=len(followed),
            tokens=sum(len(tokens) for tokens in self._continuations),
            leaves=float(np.mean(leaves)),
            differs=float(np.mean(differs)),
        )
