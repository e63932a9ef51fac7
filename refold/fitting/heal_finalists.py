"""Heals the best candidates of a search briefly, and the best of these for the whole budget: ranks flip by healing."""

from collections.abc import Sequence

from refold.fitting.look import Looker
from refold.fitting.search import Tried
from refold.recipe.stages import choose_stages

FINALISTS = 3
"""Candidates that are healed briefly."""
BRIEF_SHARE = 10
"""Tokens of the whole healing for each token of a brief one."""


def healing_tokens(tokens: int, num_candidates: int) -> tuple[int, int, int]:
    """Returns the number of finalists, the tokens of each brief healing, and the tokens of all healing together."""
    finalists = min(FINALISTS, num_candidates)
    brief = tokens // BRIEF_SHARE if finalists > 1 else 0
    return finalists, brief, tokens + finalists * brief


def heal_finalists(looker: Looker, found: Sequence[Tried], tokens: int) -> list[Tried]:
    """Heals the best candidates for a tenth of the tokens, and the one that is then best for all of them.

    Args:
        looker: Converts, heals and measures.
        found: Candidates, the best first.
        tokens: Tokens of the whole healing.

    Returns:
        The healed candidates, the chosen one first, each after its longest healing.
    """
    finalists, brief, _ = healing_tokens(tokens, len(found))
    briefly = [_healed(looker, each, brief) for each in found[:finalists]] if brief else list(found[:1])
    briefly.sort(key=lambda each: each.looked.loss)
    best = Tried(briefly[0].choice, briefly[0].unhealed or briefly[0].looked)
    return [_healed(looker, best, tokens), *briefly[1:]]


def _healed(looker: Looker, tried: Tried, tokens: int) -> Tried:
    stages, before = choose_stages(tokens=tokens), tried.looked
    return Tried(tried.choice, looker.look(before.recipe, before.name, "look", stages), before, tokens)


def measure_for_report(looker: Looker, tried: Tried) -> Tried:
    """Returns a candidate with its losses on the text of the report, where no choice was made."""
    before = tried.unhealed or tried.looked
    unhealed = looker.look(before.recipe, before.name, "report")
    if not tried.tokens:
        return Tried(tried.choice, unhealed)
    healed = looker.look(before.recipe, before.name, "report", choose_stages(tokens=tried.tokens))
    return Tried(tried.choice, healed, unhealed, tried.tokens)
