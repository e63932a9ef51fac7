"""All healing objectives by their names in recipes."""

from collections.abc import Mapping
from typing import Any

from refold.errors import HealError
from refold.healing.objectives.attention_matrices import AttentionMatrices
from refold.healing.objectives.distil import Distil
from refold.healing.objectives.exits import Exits
from refold.healing.objectives.hidden_states import HiddenStates
from refold.healing.objectives.mixer_outputs import MixerOutputs
from refold.healing.objectives.next_token import NextToken
from refold.healing.objectives.objective import Objective
from refold.recipe.objectives import REGISTERED, ObjectiveOptions, StageObjectives

OBJECTIVES: Mapping[str, type[Objective]] = {
    "next_token": NextToken,
    "distil": Distil,  # https://arxiv.org/abs/2410.20672
    "mixer_outputs": MixerOutputs,  # https://arxiv.org/abs/2410.10254 and https://arxiv.org/abs/2505.03005
    "hidden_states": HiddenStates,  # https://arxiv.org/abs/2408.10189
    "attention_matrices": AttentionMatrices,  # https://arxiv.org/abs/2408.10189
    "exits": Exits,  # https://arxiv.org/abs/2410.20672
}

_registered: dict[str, type[Objective]] = {}


def register_objective(name: str, objective: Any, options: type = ObjectiveOptions) -> None:
    """Registers an objective, so that a `HealStage` of this process can name it.

    Register it again before a run is resumed. A second registration of a name replaces the first.

    Args:
        name: The name in `HealStage(objective=name)`.
        objective: A subclass of `Objective`.
        options: Class of its options, a subclass of `ObjectiveOptions`, which itself has only a weight.

    Raises:
        HealError: The name belongs to a built-in objective or is no identifier, or a class has another base.
    """
    if name in OBJECTIVES or name == "registered" or not name.isidentifier():
        raise HealError(
            f"register_objective: a name that is no built-in objective's is required (got '{name}'); built in are "
            f"{', '.join(OBJECTIVES)}"
        )
    if not (isinstance(objective, type) and issubclass(objective, Objective)):
        raise HealError(f"register_objective: a subclass of Objective is required (got {objective!r})")
    if not (isinstance(options, type) and issubclass(options, ObjectiveOptions)):
        raise HealError(f"register_objective: a subclass of ObjectiveOptions is required (got {options!r})")
    REGISTERED[name], _registered[name] = options, objective


def make_objectives(chosen: StageObjectives) -> dict[str, Objective]:
    """Makes the objectives of a stage, by name."""
    known = {**OBJECTIVES, **_registered}
    return {name: known[name](options) for name, options in chosen.chosen().items()}
