"""The search of a fit: chooses from the menu, looks at the best candidates, corrects the predictions, chooses again."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from refold.errors import RefoldError
from refold.families.arch import ArchSpec
from refold.fitting.budget import Limits
from refold.fitting.choose import predicted
from refold.fitting.correct import Seen, fit_scales
from refold.fitting.look import Looked
from refold.fitting.menu import PAIRS, TIE, FitChoice, Menu
from refold.fitting.options import MATRIX_CLASSES
from refold.fitting.windows import cheapest_candidate, choose_candidates

ALTERNATIVES = 4
"""Candidates that are drawn from the menu at a time."""
MOST_RAISE = 2.0
"""Most factor by which the loss that is asked for is raised after one look."""
SLACK = 1e-6
"""Share by which counted costs may differ from a limit: rounding of sums."""


class Tried(NamedTuple):
    """A candidate that was looked at.

    Attributes:
        choice: The choice, with the loss that was predicted when it was made.
        looked: Its recipe, costs and losses, after healing if it was healed.
        unhealed: The same before healing; None if it was not healed.
        tokens: Tokens of healing.
    """

    choice: FitChoice
    looked: Looked
    unhealed: Looked | None = None
    tokens: int = 0


@dataclass
class Search:
    """Finds the best choice within limits; corrections of the predictions serve the next limits too.

    Attributes:
        menu: The menu; its factors are replaced by fitted ones.
        arch: The source.
        look: Converts and measures a choice under a name.
        is_legal: Says whether a converted candidate may be the result, beside the limits of costs.
        without: Kinds and classes of choice that may not be used.
        engine: Name of the engine that `is_legal` judges for; None: none.
        seen: All candidates so far: losses predicted without factors, and the measured divergence.
    """

    menu: Menu
    arch: ArchSpec
    look: Callable[[FitChoice, str], Looked]
    is_legal: Callable[[Looked], bool] = lambda looked: True
    without: Collection[str] = ()
    engine: str | None = None
    seen: list[Seen] = field(default_factory=list)

    def find(self, limits: Limits, looks: int, name: str) -> list[Tried]:
        """Looks at candidates and returns those that are within the limits and legal, the best first.

        The first candidate is the best by prediction. After each one the factors of the predictions are fitted to all
        that was measured, and the best candidate that was not looked at is next.

        Args:
            limits: Upper limits of the costs.
            looks: Number of candidates to look at, at most.
            name: Name of the candidates; a number follows.

        Raises:
            RefoldError: No choice is within the limits, or no converted candidate is legal; or an error of conversion
                or measurement.
        """
        tried: list[Tried] = []
        for number in range(1, looks + 1):
            candidate = self._next(limits, [each.choice for each in tried])
            if candidate is None:
                break
            found = Tried(candidate, self.look(candidate, f"{name} {number}"))
            tried.append(found)
            self._learn(found)
        return sorted(self._legal(tried, limits), key=lambda each: each.looked.divergence)

    def find_cheapest(self, limits: Limits, quantity: str, max_loss: float, looks: int, name: str) -> list[Tried]:
        """Looks at the cheapest choices whose loss is predicted to be small enough, and returns those where it is.

        Each look corrects the predictions. Where a choice comes again although its loss was too large, or too small to
        stop there, the loss that is asked for moves by the same factor.

        Args:
            limits: Upper limits of the costs.
            quantity: The quantity to make smallest.
            max_loss: Most measured loss, in nats per token.
            looks: Number of candidates to look at, at most.
            name: Name of the candidates; a number follows.

        Returns:
            The candidates within the loss and the limits, the cheapest first.

        Raises:
            RefoldError: As for `find`; or no legal candidate is within the loss: the message names the nearest.
        """
        tried: dict[object, Tried] = {}
        wanted = max_loss
        for number in range(1, looks + 1):
            candidate = self._cheapest(limits, quantity, wanted, is_first=not tried)
            if candidate is not None and candidate.key in tried:
                wanted *= max_loss / max(tried[candidate.key].looked.loss, max_loss / MOST_RAISE)
                candidate = self._cheapest(limits, quantity, wanted, is_first=False)
            if candidate is None or candidate.key in tried:
                break
            tried[candidate.key] = Tried(candidate, self.look(candidate, f"{name} {number}"))
            self._learn(tried[candidate.key])
        legal = self._legal(tried.values(), limits)
        able = [each for each in legal if each.looked.loss <= max_loss]
        if not able:
            least = min(each.looked.loss for each in legal)
            raise RefoldError(
                f"--max-loss: a measured loss of at most {max_loss:g} nats is required (got {least:.4f} at best in "
                f"{len(tried)} looks); raise --looks or --max-loss"
            )
        return sorted(able, key=lambda each: getattr(each.looked.costs, quantity))

    def _cheapest(self, limits: Limits, quantity: str, wanted: float, is_first: bool) -> FitChoice | None:
        """Returns the cheapest choice within a predicted loss; None if there is none and candidates were tried."""
        try:
            return cheapest_candidate(self.menu, self.arch, quantity, wanted, limits, self.without)
        except RefoldError:
            # Corrected predictions may leave no choice; the candidates so far decide.
            if is_first:
                raise
            return None

    def _legal(self, tried: Collection[Tried], limits: Limits) -> list[Tried]:
        """Returns the candidates that may be the result."""
        within = [each for each in tried if is_within(each, limits)]
        legal = [each for each in within if self.is_legal(each.looked)]
        if not legal:
            wanted = "within the limits" if not within or self.engine is None else f"that {self.engine} holds"
            raise RefoldError(
                f"fit: a converted candidate {wanted} is required (got none in {len(tried)} looks); raise --looks, or "
                f"leave kinds of choice out with --without"
            )
        return legal

    def _learn(self, tried: Tried) -> None:
        """Fits the factors of the predictions to one more measured candidate."""
        plain = self.menu.model_copy(update={"scales": {}})
        self.seen.append(Seen(predicted(plain, tried.choice).losses, tried.looked.divergence))
        self.menu = self.menu.model_copy(update={"scales": fit_scales(self.seen, loss_classes(self.menu))})

    def _next(self, limits: Limits, tried: Sequence[FitChoice]) -> FitChoice | None:
        known = {each.key for each in tried}
        for count in (1, ALTERNATIVES):
            for found in choose_candidates(self.menu, self.arch, limits, count, self.without):
                if found.choice.key not in known:
                    return found.choice
        return None


def loss_classes(menu: Menu) -> set[str]:
    """Returns all classes of choice that a menu has."""
    kinds = {form.kind for part in menu.parts for form in part.forms} - {"whole"}
    return kinds | {*MATRIX_CLASSES, TIE, PAIRS}


def is_within(tried: Tried, limits: Limits) -> bool:
    """Says whether a converted candidate is within the limits by the costs of its blueprint."""
    costs: Mapping[str, float] = tried.looked.costs._asdict()
    judged = {name: limit for name, limit in limits._asdict().items() if limit is not None and name in costs}
    return all(costs[name] <= limit * (1 + SLACK) for name, limit in judged.items())
