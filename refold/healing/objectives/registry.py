"""All healing objectives, by the name a recipe gives them."""

from collections.abc import Mapping

from refold.healing.objectives.distil import Distil
from refold.healing.objectives.next_token import NextToken
from refold.healing.objectives.objective import Objective

OBJECTIVES: Mapping[str, type[Objective]] = {
    "distil": Distil,  # https://arxiv.org/abs/2410.20672
    "next_token": NextToken,
}
