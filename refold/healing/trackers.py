"""Experiment trackers: what the log has, sent along to tools the user has installed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import filter_trackers, get_available_trackers

from refold.errors import HealError
from refold.healing.log import StepRecord
from refold.healing.team import Team
from refold.suggest import did_you_mean

KNOWN = ("tensorboard", "wandb", "trackio")


class Trackers:
    """The trackers of a run, on its first process.

    Args:
        names: which ones; none: nothing is sent anywhere.
        project: folder that is healed; its name is the run's.
        config: what the run is made of, as plain data.
        team: the processes of the run.

    Raises:
        HealError: an unknown tracker, or one that is not installed.
    """

    def __init__(self, names: Sequence[str], project: Path, config: dict[str, Any], team: Team):
        self._accelerator: Any = None
        for name in names:
            if name not in KNOWN:
                raise HealError(
                    f"report_to: one of {', '.join(KNOWN)} is required (got '{name}'){did_you_mean(name, KNOWN)}"
                )
            if name not in {str(known) for known in get_available_trackers()}:
                raise HealError(f"report_to: {name} is required (not installed); pip install {name}")
        if names:
            folder = project.parent / "trackers"
            self._accelerator = team.accelerator
            self._accelerator.project_configuration.set_directories(str(folder))
            self._accelerator.log_with = filter_trackers(list(names), folder)
            self._accelerator.init_trackers(project.name, config)

    def send(self, record: StepRecord) -> None:
        """Sends one step."""
        if self._accelerator is None:
            return
        values: dict[str, Any] = {"loss": record.loss, **record.objectives}
        values |= {"learning_rate": record.learning_rate, "grad_norm": record.grad_norm, "tokens": record.tokens}
        if record.held_out is not None:
            values["held_out_bits_per_byte"] = record.held_out
        self._accelerator.log(values, step=record.step)

    def close(self) -> None:
        """Ends the run in all of them."""
        if self._accelerator is not None:
            self._accelerator.end_training()
            self._accelerator = None
