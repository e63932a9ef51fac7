"""One healing stage: from a model folder to the same model trained, resumable at any moment."""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from refold.blueprint.recipe import HealStage
from refold.checkpoint import provenance
from refold.checkpoint.folder import AtomicFolder
from refold.checkpoint.locate import Source
from refold.checkpoint.writer import count_bytes
from refold.data.packing import PackedSequences
from refold.errors import HealError
from refold.healing import training_state
from refold.healing.checkpoints import Checkpoints, RunState
from refold.healing.display import Display
from refold.healing.log import LOG_NAME, StepRecord, TrainLog
from refold.healing.loop import Loop
from refold.healing.objectives.registry import OBJECTIVES
from refold.healing.optimizer import make_optimizer
from refold.healing.output import describe, tensor_specs, write_healed
from refold.healing.prepared import Data, PreparedRun, prepare
from refold.healing.schedule import Schedule
from refold.healing.student import TrainingModel
from refold.modeling.load import choose_device, load_model, open_source

CHECKPOINT_SECONDS = 300.0


@dataclass(frozen=True)
class HealResult:
    """What a stage did.

    Attributes:
        folder: the folder written.
        tokens: training tokens seen.
        steps: optimizer steps, skipped ones included.
        losses: `loss` and its parts over the last tenth of the steps, nats per token.
        skipped_steps: steps whose loss or gradient was not finite; they changed no weight.
        seconds: training time, earlier runs that were resumed included.
        resumed_from: step of the checkpoint this call began with, None where it began anew.
        epochs: how often the data was seen.
    """

    folder: Path
    tokens: int
    steps: int
    losses: dict[str, float]
    skipped_steps: int
    seconds: float
    resumed_from: int | None
    epochs: float

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second of training."""
        return self.tokens / max(self.seconds, 1e-9)


def heal(
    model: str | Path | Source,
    destination: str | Path,
    data: Data,
    stage: HealStage,
    *,
    teacher: str | Path | Source | None = None,
    device: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    command: str = "",
    on_step: Callable[[StepRecord], None] | None = None,
    quiet: bool = False,
) -> HealResult:
    """Trains a model for one stage and writes it into a new folder.

    Training is in float32 weights; what is written has the dtypes of what was read. A run that ended early left
    `.NAME.heal` beside the destination and goes on from there when the same call is made again; on the same CPU the
    result is the same to the bit.

    Args:
        model: A folded model, or any source (then the result is that source, trained further).
        destination: The folder to write: there whole afterwards, or not at all.
        data: Files and folders of text, or an opened data source.
        stage: What to train, for how long and how.
        teacher: What `distil` learns from; None: what the model was folded from; of a source, a fixed copy of itself.
        device: Where to train; None: `choose_device()`.
        overwrite: Replace a folder refold wrote.
        restart: Drop an unfinished run instead of resuming it.
        checkpoint_seconds: Time between two checkpoints.
        command: Command line, for the provenance.
        on_step: Called with the record of every step.
        quiet: Show no progress on stderr.

    Raises:
        SourceError: Model, teacher or tokenizer are missing or broken, or the vocabularies differ.
        DataError: The data cannot be read, or has tokens the model does not know.
        HealError: Training diverged, or an unfinished run with other settings lies there.
        HealInterrupted: SIGTERM or SIGINT came; a checkpoint was written.
        FolderError: The destination is taken, locked or cannot be written, or the disk is full.
    """
    located, _ = open_source(model)
    place = choose_device(device)
    student: Any = load_model(located, device=place)
    specs = tensor_specs(student)
    with AtomicFolder(destination, overwrite, needed_bytes=count_bytes(specs)) as out:
        # The folder's lock is held from here on, so the work folder is ours alone.
        work = out.destination.parent / f".{out.destination.name}.heal"
        if restart:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(exist_ok=True)
        run = prepare(located, student.float(), teacher, data, stage, work, place)
        result, facts = _train(run, work, out.destination, checkpoint_seconds, on_step, quiet)
        line = provenance.Stage(
            stage="heal",
            source=provenance.describe_source(located),
            recipe=run.stage.model_dump(mode="json"),
            seed=stage.seed,
            tokens=result.tokens,
            command=command,
        )
        write_healed(out, located, student, specs, line, facts, work / LOG_NAME)
    shutil.rmtree(work, ignore_errors=True)
    return result


def _train(
    run: PreparedRun,
    work: Path,
    destination: Path,
    checkpoint_seconds: float,
    on_step: Callable[[StepRecord], None] | None,
    quiet: bool,
) -> tuple[HealResult, dict[str, str]]:
    stage, context = run.stage, run.stage.context
    assert context is not None
    assert stage.micro_batch is not None
    schedule = Schedule(stage.tokens, context, max(1, stage.batch_tokens // context), stage.learning_rate, stage.warmup)
    accelerator = _accelerator()
    training = TrainingModel(run.student, OBJECTIVES[stage.objective](stage), run.autocast)
    optimizer = make_optimizer(training, stage)
    with contextlib.ExitStack() as stack:
        # Dropout, where a source has some, draws from torch's generators, which belong to the caller.
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(stage.seed)
        display = Display(stage.tokens, quiet)
        checkpoints = Checkpoints(work / "checkpoints", run.identity, display.tell)
        found = checkpoints.load()
        state = RunState()
        if found is not None:
            state, tensors = found
            training_state.restore(run.student, optimizer, tensors)
            del tensors
            display.tell(f"resumed at step {state.step} of {schedule.num_steps}")
        resumed_from = None if found is None else state.step
        loop = Loop(
            accelerator=accelerator,
            model=accelerator.prepare(training),
            teacher=run.teacher,
            optimizer=optimizer,
            schedule=schedule,
            data=PackedSequences(run.tokenised.tokens, run.tokenised.offsets, context, stage.seed),
            micro_batch=stage.micro_batch,
            gradient_clip=stage.gradient_clip,
            checkpoints=checkpoints,
            checkpoint_seconds=checkpoint_seconds,
            device=run.device,
            state=state,
        )
        display.start_at(schedule.tokens_after(state.step))
        log = stack.enter_context(TrainLog(work / LOG_NAME, state.step))
        stack.enter_context(display)

        def record(step: StepRecord) -> None:
            display.show(step)
            if on_step is not None:
                on_step(step)

        loop.run(log, record)
    accelerator.free_memory()
    losses = _last_losses(work / LOG_NAME, schedule.num_steps)
    result = HealResult(
        folder=destination,
        tokens=stage.tokens,
        steps=schedule.num_steps,
        losses=losses,
        skipped_steps=loop.state.skipped_steps,
        seconds=loop.state.seconds,
        resumed_from=resumed_from,
        epochs=stage.tokens / run.tokenised.num_tokens,
    )
    return result, describe(stage, stage.tokens, losses)


def _accelerator() -> Accelerator:
    try:
        accelerator = Accelerator(device_placement=False, mixed_precision="no")
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise HealError(f"heal: an accelerate set-up without mixed precision is required ({reason})") from None
    if accelerator.num_processes > 1:
        raise HealError(f"heal: one process is required (got {accelerator.num_processes}); start it without a launcher")
    return accelerator


def _last_losses(log: Path, num_steps: int) -> dict[str, float]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in lines[-max(1, num_steps // 10) :] if not line["skipped"]]
    known = set(StepRecord.__dataclass_fields__) - {"loss"}
    names = [name for name in lines[0] if name not in known] if lines else []
    return {name: sum(line[name] for line in lines) / len(lines) for name in names}
