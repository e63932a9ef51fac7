"""All healing objectives, by the name a recipe gives them."""

from collections.abc import Mapping

from refold.healing.objectives.attention_matrices import AttentionMatrices
from refold.healing.objectives.distil import Distil
from refold.healing.objectives.exits import Exits
from refold.healing.objectives.hidden_states import HiddenStates
from refold.healing.objectives.mixer_outputs import MixerOutputs
from refold.healing.objectives.next_token import NextToken
from refold.healing.objectives.objective import Objective
from refold.recipe.objectives import StageObjectives

OBJECTIVES: Mapping[str, type[Objective]] = {
    "next_token": NextToken,
    "distil": Distil,  # https://arxiv.org/abs/2410.20672
    "mixer_outputs": MixerOutputs,  # https://arxiv.org/abs/2410.10254 and https://arxiv.org/abs/2505.03005
    "hidden_states": HiddenStates,  # https://arxiv.org/abs/2408.10189
    "attention_matrices": AttentionMatrices,  # https://arxiv.org/abs/2408.10189
    "exits": Exits,  # https://arxiv.org/abs/2410.20672
}


def make_objectives(chosen: StageObjectives) -> dict[str, Objective]:
    """Makes the objectives of a stage, by name."""
    return {name: OBJECTIVES[name](options) for name, options in chosen.chosen().items()}
