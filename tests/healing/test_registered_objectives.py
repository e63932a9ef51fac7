"""Objectives of users, registered under a name in Python."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from refold.errors import HealError
from refold.healing.objectives.objective import Loss, Objective, Step
from refold.healing.objectives.registry import register_objective
from refold.recipe.heal import HealStage
from refold.recipe.objectives import REGISTERED, ObjectiveOptions
from refold.scoring.chunked import chunked_loss


class Scaled(ObjectiveOptions):
    factor: float = 1.0


class Text(Objective[Scaled]):
    student_wants = frozenset({"predictions"})

    def loss(self, step: Step) -> Loss:
        assert step.student is not None
        found = chunked_loss(step.student.predictions, step.labels, num_tokens=step.num_tokens)
        return Loss(self.options.factor * found.total, found.means)


@pytest.fixture(autouse=True)
def registered():
    register_objective("text", Text, Scaled)
    yield
    REGISTERED.pop("text", None)


def test_a_registered_objective_trains_as_the_built_in_one_it_equals(healing: Any, weights: Any) -> None:
    healing({"tokens": 8 * 64, "objective": "next_token"})
    wanted = weights(healing.destination)
    healing({"tokens": 8 * 64, "objective": "text"}, overwrite=True)
    found = weights(healing.destination)
    assert all(torch.equal(found[name], each) for name, each in wanted.items())
    assert '"text"' in (healing.destination / "provenance.json").read_text()


def test_its_options_and_weight_hold_beside_others(healing: Any) -> None:
    healing({"tokens": 64, "objective": "next_token"})
    healing({"tokens": 64, "objective": {"next_token": {}, "text": {"weight": 0.5, "factor": 3}}}, overwrite=True)
    alone, both = healing.records
    assert both.loss == pytest.approx(2.5 * alone.loss, rel=1e-5)


def test_a_stage_with_one_survives_being_written_down() -> None:
    stage = HealStage(objective={"distil": {}, "text": {"factor": 2}}, tokens=64)  # pyright: ignore
    again = HealStage.model_validate(stage.model_dump(mode="json"))
    assert again == stage
    assert again.objective.chosen()["text"] == Scaled(factor=2)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="must be the name of an objective"):
        HealStage(objective=Text, tokens=64)  # pyright: ignore
    with pytest.raises(ValueError, match="factr"):
        HealStage(objective={"text": {"factr": 2}}, tokens=64)  # pyright: ignore
    with pytest.raises(ValueError, match=r"must be a name given to refold.register_objective \(got other\)"):
        HealStage(objective={"registered": {"other": {}}}, tokens=64)  # pyright: ignore
    with pytest.raises(HealError, match="no built-in objective's is required"):
        register_objective("distil", Text)
    with pytest.raises(HealError, match="a subclass of Objective is required"):
        register_objective("lambda_alone", lambda step: 0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(HealError, match="a subclass of Objective is required"):
        register_objective("mine", Scaled)  # pyright: ignore


def test_the_example_of_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "heal.md").read_text(encoding="utf-8")
    block = next(
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "register_objective" in block
    )
    scope: dict[str, Any] = {}
    exec(compile(block, "heal.md", "exec"), scope)
    assert set(scope["stage"].objective.chosen()) == {"distil", "beginnings"}
    REGISTERED.pop("beginnings")
