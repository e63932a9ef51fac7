"""Settings chosen for the stages of a run, stored in its work folder so that a resumed run uses the same ones."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from refold.checkpoint.atomic_file import write_json
from refold.healing.defaults import choose_learning_rate, complete_stage
from refold.healing.distance import Distance
from refold.healing.team import Team
from refold.recipe.heal import HealStage

CHOSEN = ("context", "batch_tokens", "warmup")


class Choices:
    """Completes stages by the rules of `refold.healing.defaults`, or with the stored settings if the run is resumed.

    Args:
        folder: The work folder.
        team: The processes of the run; the first one writes.
    """

    def __init__(self, folder: Path, team: Team):
        self._folder, self._team = folder, team

    def complete(self, stages: Sequence[HealStage], positions: int) -> tuple[HealStage, ...]:
        """Returns the stages with context, batch and warm-up set.

        Args:
            stages: As the recipe has them.
            positions: Tokens of the longest sequence the model reads.
        """
        given = [stage.model_dump(mode="json", exclude_unset=True) for stage in stages]
        path = self._folder / "stages.json"

        def choose() -> list[dict[str, Any]]:
            completed = [complete_stage(stage, positions) for stage in stages]
            return [{key: getattr(stage, key) for key in CHOSEN} for stage in completed]

        # A run with other stages is refused later, by its identity; until then it must not get the stored settings.
        kept = self._keep(path, lambda: {"given": given, "chosen": choose()})
        chosen = kept["chosen"] if kept["given"] == given else choose()
        return tuple(stage.model_copy(update=found) for stage, found in zip(stages, chosen, strict=True))

    def learning_rate(
        self, index: int, hidden_size: int, measure: Callable[[], Distance | None]
    ) -> tuple[float, float | None]:
        """Returns the learning rate of a stage and the distance it follows from.

        Args:
            index: Of the stage.
            hidden_size: Width of the residual stream.
            measure: Measures the distance at the stage's start, on every process.
        """
        path = self._folder / f"learning-rate-{index + 1}.json"
        if self._is_missing(path):
            found = measure()
            distance = None if found is None else found.nats
            rate = choose_learning_rate(hidden_size, distance)
            kept = {"learning_rate": rate, "distance": distance, **({} if found is None else vars(found))}
            self._team.first(lambda: write_json(path, kept))
            self._team.wait()
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["learning_rate"], kept["distance"]

    def _keep(self, path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if self._is_missing(path):
            self._team.first(lambda: write_json(path, make()))
            self._team.wait()
        return json.loads(path.read_text(encoding="utf-8"))

    def _is_missing(self, path: Path) -> bool:
        # All processes check before one of them writes, because the next operations are collective.
        return self._team.sum([float(not path.exists())])[0] > 0
