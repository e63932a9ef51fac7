"""Training steps of the identity fold in refold's loop, and of transformers' model in its Trainer."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from refold.conversion.convert import ConvertOptions, convert
from refold.data.packing import PackedSequences
from refold.healing.checkpoints import RunState
from refold.healing.groups import Trainable, WeightGroups
from refold.healing.loop import Loop
from refold.healing.objectives.registry import make_objectives
from refold.healing.optimizer import make_optimizers
from refold.healing.precision import attend_in_float32
from refold.healing.schedule import Schedule
from refold.healing.student import Teacher, TrainingModel, teacher_wants
from refold.healing.team import Team
from refold.modeling.load import load_model
from refold.recipe.heal import HealStage

CONTEXT = 256
SEQUENCES = 8
"""Of one step, all in one forward pass."""
STEPS = 3
"""Of one timing."""
OURS, THEIRS = "refold", "Trainer"


def documents(vocab_size: int, lengths: np.ndarray, seed: int) -> list[np.ndarray]:
    """Documents of random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab_size, size=length).astype(np.uint16) for length in lengths]


def make_loop(
    model: PreTrainedModel, texts: list[np.ndarray], precision: str, teacher: Any = None, device: str = "cpu"
) -> Loop:
    """Refold's loop over packed documents, without checkpoints."""
    objective = "next_token" if teacher is None else "distil"
    stage = HealStage.model_validate({"tokens": 10**9, "objective": objective, "precision": precision})
    autocast = torch.bfloat16 if precision == "bfloat16" else None
    if autocast is not None:
        attend_in_float32(model)
    AcceleratorState._reset_state(True)  # each side sets accelerate up in its own precision
    team = Team(torch.device(device))
    trainable = Trainable(stage, WeightGroups(model, None))
    objectives = make_objectives(stage.objective)
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return Loop(
        team=team,
        model=TrainingModel(model).begin(objectives, autocast),
        student=model,
        teacher=None if teacher is None else Teacher(teacher, autocast, teacher_wants(objectives)),
        stored=None,
        optimizers=make_optimizers(model, stage, trainable),
        trainable=trainable,
        thaw=None,
        schedule=Schedule(10**9, CONTEXT, SEQUENCES, 1e-4, 0.0),
        data=PackedSequences(np.concatenate(texts), offsets, CONTEXT, 0),
        micro_batch=SEQUENCES,
        gradient_clip=1.0,
        checkpoints=None,
        checkpoint_seconds=1e9,
        held_out=None,
        measure_every=10**9,
        tokens_before=0,
        state=RunState(),
    )


class _Clock(TrainerCallback):
    """Notes when each step of Trainer ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def run_trainer(
    model: PreTrainedModel, texts: list[np.ndarray], precision: str, num_steps: int, device: str = "cpu"
) -> float:
    """Seconds of `num_steps` steps of Trainer after its first; documents are padded to the longest of a batch."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for index, row in enumerate(rows):
            text = torch.from_numpy(row["input_ids"].astype(np.int64))
            ids[index, : len(text)], mask[index, : len(text)] = text, 1
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=num_steps + 1,
            per_device_train_batch_size=SEQUENCES,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            bf16=precision == "bfloat16",
            use_cpu=device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        rows: Any = [{"input_ids": text} for text in texts]
        AcceleratorState._reset_state(True)  # each side sets accelerate up in its own precision
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[clock]).train()
    return clock.ends[-1] - clock.ends[0]


@contextlib.contextmanager
def identity_pair(source: Path, device: str = "cpu") -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    """Yields the identity fold of a source and the source itself, float32, in training mode."""
    with tempfile.TemporaryDirectory() as folder:
        convert(source, Path(folder) / "identity", options=ConvertOptions(allow_larger=True))
        fold = load_model(Path(folder) / "identity", dtype="float32", device=device)
        yield fold.train(), load_model(source, dtype="float32", device=device).train()


def run_loop(loop: Loop, num_steps: int) -> float:
    """Seconds of `num_steps` steps of refold's loop."""
    start = time.perf_counter()
    for _ in range(num_steps):
        loop.step()
    return time.perf_counter() - start


def where_time_goes(loop: Loop, num_steps: int) -> dict[str, float]:
    """Share of a distillation step's time in each part."""
    taken: dict[str, float] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **keywords)
            finally:
                taken[name] = taken.get(name, 0.0) + time.perf_counter() - start

        return run

    assert loop.teacher is not None
    loop.teacher.observe = timed("teacher's forward pass", loop.teacher.observe)
    model: Any = loop.model
    objectives = model.objectives
    for objective in objectives.values():
        objective.loss = timed("losses over the vocabulary, with their gradients", objective.loss)
    model.forward = timed("student's forward pass and losses", model.forward)
    backward = torch.Tensor.backward
    torch.Tensor.backward = timed("backward pass", backward)  # pyright: ignore[reportAttributeAccessIssue]
    for optimizer in loop.optimizers:
        optimizer.step = timed("optimizer", optimizer.step)
    try:
        total = run_loop(loop, num_steps)
    finally:
        torch.Tensor.backward = backward
    taken["student's forward pass"] = (
        taken.pop("student's forward pass and losses") - taken["losses over the vocabulary, with their gradients"]
    )
    taken["all else (data, clipping, bookkeeping)"] = total - sum(taken.values())
    return {name: seconds / total for name, seconds in taken.items()}
