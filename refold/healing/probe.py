"""Estimates of hours, memory and disk of a run from its first steps, run in a temporary folder."""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refold.checkpoint.locate import Source
from refold.checkpoint.writer import count_bytes
from refold.data.corpus import Data
from refold.errors import HealError
from refold.healing.checkpoints import NUM_KEPT
from refold.healing.defaults import complete_stage, count_steps, describe_stage
from refold.healing.output import tensor_specs
from refold.healing.prepared import HeldOutData, prepare
from refold.healing.run import HealOptions, Run
from refold.healing.team import Team
from refold.modeling.load import choose_device, load_model, open_source
from refold.progress import describe_duration
from refold.recipe.heal import HealStage

NUM_STEPS = 10


@dataclass(frozen=True)
class Estimate:
    """Holds the estimated time, memory and disk of a run, and its settings.

    Attributes:
        tokens: training tokens of all stages.
        steps: optimizer steps of all stages.
        tokens_per_second: median speed of the first stage, without the first two steps.
        hours: time of all stages at this speed.
        peak_memory_bytes: memory of this process; on a GPU the memory of its tensors.
        disk_bytes: checkpoints, tokens and result while the run trains.
        loss: loss of the first step.
        settings: a line for each stage: steps, batch, learning rate and warm-up.
    """

    tokens: int
    steps: int
    tokens_per_second: float
    hours: float
    peak_memory_bytes: int
    disk_bytes: int
    loss: float
    settings: tuple[str, ...] = ()

    @property
    def figures(self) -> dict[str, Any]:
        """Returns all figures as plain data."""
        return {**vars(self), "line": self.line}

    @property
    def line(self) -> str:
        """Returns the estimate in one line, and a line with the settings of each stage."""
        estimate = (
            f"{self.tokens:,} tokens in {self.steps:,} steps: {describe_duration(self.hours)} at "
            f"{self.tokens_per_second:,.0f} tokens/s; {self.peak_memory_bytes / 1e9:.2f} GB of memory, "
            f"{self.disk_bytes / 1e9:.2f} GB of disk; first loss {self.loss:.3f}"
        )
        return "\n".join((estimate, *self.settings))


def probe(
    model: str | Path | Source,
    data: Data,
    stages: HealStage | Sequence[HealStage],
    *,
    held_out: HeldOutData | None = None,
    teacher: str | Path | Source | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Estimate:
    """Runs ten steps of the first stage in a temporary folder and estimates the whole run.

    A teacher that the run would train first is used untrained; the estimate includes its training tokens.

    Args:
        model, data, stages, teacher, device: as for `heal`.
        held_out: held-out text of `heal`; the probe only reads it.
        quiet: show no progress on stderr.

    Raises:
        RefoldError: as for `heal`, before hours are spent.
    """
    given = (stages,) if isinstance(stages, HealStage) else tuple(stages)
    team = Team(choose_device(device))
    if team.size > 1:
        raise HealError(f"dry run: one process is required (got {team.size}); start it without a launcher")
    located, _ = open_source(model)
    student: Any = load_model(located, dtype="auto", device=team.device)
    stored = count_bytes(tensor_specs(student))
    if team.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(team.device)
    with tempfile.TemporaryDirectory(prefix="refold-probe-") as folder:
        work = Path(folder)
        whole = [complete_stage(stage, student.config.max_position_embeddings) for stage in given]
        short = [_shortened(stage) for stage in whole]
        prepared = prepare(located, student.float(), teacher, data, held_out, short, work, team)
        run = Run(prepared, student, work, work / "probe", team, HealOptions(quiet=quiet), _refuse_training)
        records = run.probe(run.with_rate(0, prepared.stages[0], whole[0]), NUM_STEPS)
        later = [f"stage {index}: {describe_stage(stage)}" for index, stage in enumerate(whole[1:], start=2)]
        peak = _peak_memory(team.device)
    team.leave()
    seconds = statistics.median(1 / record.tokens_per_second for record in records[2:] or records)
    tokens = sum(stage.tokens + (stage.teacher_tokens or 0) for stage in given)
    weights = sum(value.numel() * 4 for value in student.parameters())
    trained = sum(value.numel() * 4 for value in student.parameters() if value.requires_grad)
    return Estimate(
        tokens=tokens,
        steps=sum(count_steps(stage.tokens, stage.context or 1, stage.batch_tokens or 1) for stage in whole),
        tokens_per_second=1 / seconds,
        hours=tokens * seconds / 3600,
        peak_memory_bytes=peak,
        # Checkpoints of weights and two moments, one more during writing; the result; two bytes for each token.
        disk_bytes=(NUM_KEPT + 1) * (weights + 2 * trained) + stored + 2 * tokens,
        loss=records[0].loss,
        settings=(run.settings[0], *later),
    )


def _shortened(stage: HealStage) -> HealStage:
    tokens = min(stage.tokens, NUM_STEPS * max(stage.batch_tokens or 1, stage.context or 1))
    return stage.model_copy(update={"tokens": tokens, "teacher_tokens": None})


def _refuse_training(source: Source, target: Path, stage: HealStage) -> None:
    raise AssertionError("a probe trains no teacher")


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
