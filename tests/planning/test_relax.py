"""Ranks that a budget holds, at its edges."""

import pytest

from refold.errors import RecipeError
from refold.planning.relax import choose_ranks
from refold.recipe.recipe import LoraRelax

LINEARS = {"q_proj": (16, 16), "k_proj": (8, 16)}
UNIT = 16 + 16 + 8 + 16
"""Parameters of one rank of both linears."""


def ranks(share: float, non_embedding: int) -> dict[str, int]:
    relax = LoraRelax.model_validate({"rank": {"parameters": share}})
    found, _ = choose_ranks(relax, [{"mixer": LINEARS}], {"mixer": LINEARS}, non_embedding)
    return found[0]


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_a_budget_that_a_rank_takes_exactly_holds_that_rank(rank):
    assert ranks(0.5, 2 * rank * UNIT) == {"q_proj": rank, "k_proj": rank}


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_a_budget_one_parameter_smaller_holds_one_rank_less(rank):
    if rank == 1:
        with pytest.raises(RecipeError, match=rf"at least {UNIT} parameters are required for rank 1"):
            ranks(0.5, 2 * UNIT - 2)
    else:
        assert ranks(0.5, 2 * rank * UNIT - 2) == {"q_proj": rank - 1, "k_proj": rank - 1}
