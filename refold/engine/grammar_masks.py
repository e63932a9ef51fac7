"""Masks of logits by the constraints of rows."""

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from refold.engine.grammars import Grammar, GrammarState


class GrammarMasks:
    """The constraints of the running choices.

    Args:
        vocab_size: Number of logits.
    """

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._states: dict[int, GrammarState] = {}

    def set(self, row: int, grammar: Grammar | None) -> None:
        """Gives a row the beginning of a constraint; None: any text."""
        if grammar is None:
            self._states.pop(row, None)
        else:
            self._states[row] = grammar.begin()

    def note(self, row: int, token: int) -> None:
        """Takes a new token of a row."""
        if (state := self._states.get(row)) is not None:
            state.advance(token)

    def is_complete(self, row: int) -> bool:
        """Says whether no more text may follow."""
        return row in self._states and self._states[row].is_complete

    def fault(self, row: int) -> str | None:
        """Returns why a row cannot go on, in one sentence; None: it can."""
        return self._states[row].fault if row in self._states else None

    def apply(
        self, scores: Float[Tensor, "R N"], logits: Float[Tensor, "R N"], rows: Int64[np.ndarray, " R"]
    ) -> Float[Tensor, "R N"]:
        """Returns scores that are minus infinity for tokens that constraints do not allow.

        Args:
            scores: Logits after bias and penalties, which change.
            logits: Logits of the model, which do not change.
            rows: Row of each.
        """
        bound = [index for index, row in enumerate(rows.tolist()) if row in self._states]
        if not bound:
            return scores
        allowed = np.stack([self._states[int(rows[index])].allowed(self._vocab_size) for index in bound])
        scores = scores.clone() if scores is logits else scores
        at = torch.tensor(bound, device=scores.device)
        forbidden = torch.from_numpy(~allowed).to(scores.device)
        scores[at] = scores[at].masked_fill(forbidden, -torch.inf)
        return scores
