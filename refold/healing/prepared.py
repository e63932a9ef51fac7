"""A prepared healing run: decided stages with data, objectives and schedules, teacher and held-out text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refold.checkpoint import provenance
from refold.checkpoint.companions import offers_tokenizer
from refold.checkpoint.locate import Source, locate
from refold.data.corpus import Data, open_text
from refold.data.training_data import TrainingData, open_training_data
from refold.errors import HealError, SourceError
from refold.healing.groups import Trainable, WeightGroups
from refold.healing.held_out import HeldOut
from refold.healing.objectives.objective import Objective
from refold.healing.objectives.registry import make_objectives
from refold.healing.precision import choose_precision
from refold.healing.schedule import Schedule
from refold.healing.student import teacher_wants
from refold.healing.team import Team
from refold.modeling.configuration import MODEL_TYPE
from refold.modeling.load import load_tokenizer
from refold.recipe.heal import HealStage
from refold.scoring.predict import head_of
from refold.vocabulary.kept_tokens import KeptTokens, read_kept_tokens

CPU_BYTES = 1 << 30
"""Memory for activations on a CPU. More does not use the cores better, and only misses the caches more often."""
GPU_SHARE = 0.25
"""Share of a GPU's memory for activations: weights, gradients and the optimizer's state need the rest."""


def choose_micro_batch(wish: int | None, context: int, config: Any, device: torch.device) -> int:
    """Returns the sequences of one forward pass.

    The number does not depend on free memory, so a resumed run has the same number.

    Args:
        wish: number from the stage; None: estimated from the size of the activations kept for the backward pass.
        context: tokens of one sequence.
        config: the student's configuration, for its sizes.
        device: the student's device.
    """
    if wish is not None:
        return wish
    budget = CPU_BYTES
    if device.type == "cuda":
        budget = int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    # In float32: first norms, inputs and outputs of attention and residuals, then the inner activations of the MLP.
    per_token = 4 * config.num_hidden_layers * (16 * config.hidden_size + 5 * config.intermediate_size)
    return max(1, budget // (per_token * context))


HeldOutData = Data


@dataclass(frozen=True)
class PreparedStage:
    """Holds the settings and data of one stage, without its models.

    Attributes:
        stage: the stage with all settings. A learning rate that is not set is chosen when the stage begins.
        objectives: the objectives by name; their weighted sum is minimised.
        trainable: the weights of the student that train.
        schedule: steps, positions and learning rates.
        data: the sequences.
    """

    stage: HealStage
    objectives: Mapping[str, Objective]
    trainable: Trainable
    schedule: Schedule
    data: TrainingData

    @property
    def autocast(self) -> torch.dtype | None:
        """Returns the dtype of matrix products, None for float32."""
        return torch.bfloat16 if self.stage.precision == "bfloat16" else None

    @property
    def wants_teacher(self) -> bool:
        """Returns whether an objective reads a teacher, in memory or stored."""
        stored = any(objective.stored_top_k is not None for objective in self.objectives.values())
        return stored or bool(teacher_wants(self.objectives))

    def at_rate(self, learning_rate: float) -> "PreparedStage":
        """Returns the same stage with another peak learning rate."""
        stage = self.stage.model_copy(update={"learning_rate": learning_rate})
        return replace(self, stage=stage, schedule=replace(self.schedule, peak=learning_rate))


@dataclass(frozen=True)
class PreparedRun:
    """Holds the stages of a run, its teacher and its held-out text.

    Attributes:
        stages: the stages in order.
        teacher: the teacher's model; None if no stage needs a teacher.
        kept: the tokens that the student keeps of the teacher's vocabulary; None: all.
        held_out: text whose bits per byte are measured at intervals; None: no text.
        identity: everything that affects the result, see `Checkpoints`.
    """

    stages: tuple[PreparedStage, ...]
    teacher: Source | None
    kept: KeptTokens | None
    held_out: HeldOut | None
    identity: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Returns the training tokens of all stages."""
        return sum(each.stage.tokens for each in self.stages)

    @property
    def num_steps(self) -> int:
        """Returns the optimizer steps of all stages."""
        return sum(each.schedule.num_steps for each in self.stages)

    def tokens_before(self, index: int) -> int:
        """Returns the training tokens of the stages before `index`."""
        return sum(each.stage.tokens for each in self.stages[:index])


def prepare(
    model: Source,
    student: PreTrainedModel,
    teacher: str | Path | Source | None,
    data: Data,
    held_out: HeldOutData | None,
    stages: Sequence[HealStage],
    work: Path,
    team: Team,
) -> PreparedRun:
    """Prepares a run: opens its data and finds its teacher. Errors are as for `heal`.

    Args:
        model: folder or hub id of the student.
        student: the loaded student.
        teacher: teacher named by the user; None: the default teacher.
        data: files, folders or an opened source.
        held_out: text to measure on.
        stages: stages with context, batch and warm-up.
        work: work folder, for the tokens.
        team: the processes of the run.
    """
    if not stages:
        raise HealError("heal: at least one stage is required (got none)")
    tokenizer = load_tokenizer(model)
    groups = WeightGroups(student, model.fetch())
    decided = [_decide(stage, student, team.device) for stage in stages]
    prepared: list[PreparedStage] = []
    read: dict[tuple[str, int], int] = {}  # (form, context) to sequences read by earlier stages
    for index, stage in enumerate(decided):
        assert stage.context is not None
        key = (stage.data, stage.context)
        schedule = _schedule(stage, team, read.get(key, 0))
        read[key] = schedule.first_sequence + schedule.num_sequences
        opened = open_training_data(
            data,
            tokenizer,
            context=stage.context,
            seed=stage.seed,
            budget=_budget(decided, index),
            cache_folder=work / "tokens",
            form=stage.data,
            vocab_size=head_of(student).vocab_size,
        )
        objectives = make_objectives(stage.objective)
        prepared.append(PreparedStage(stage, objectives, Trainable(stage, groups), schedule, opened))
    identity: dict[str, Any] = {}
    for number, each in enumerate(prepared, start=1):
        where = "" if len(prepared) == 1 else f"stage {number}: "
        settings = {**each.stage.model_dump(mode="json"), "data": each.data.identity}
        identity |= {f"{where}{key}": value for key, value in settings.items()}
    identity["model weights"] = _hash_weights(model)
    found, kept = None, None
    if any(each.wants_teacher for each in prepared):
        found = _find_teacher(model, teacher)
        kept = _match_tokens(model, tokenizer, found)
        # All weights are hashed, so the fingerprint's sample of weights is not needed.
        known = {key: value for key, value in found.fingerprint().items() if key in ("config_sha256", "index_sha256")}
        identity["teacher"] = {**known, "weights": _hash_weights(found)}
    elif teacher is not None:
        names = ", ".join(name for each in prepared for name in each.objectives)
        raise HealError(f"teacher: an objective that learns from one is required (got {teacher} with {names})")
    measured, identity["held_out"] = None, None
    if held_out is not None:
        source = open_text(held_out)
        context = prepared[0].stage.context
        assert context is not None
        identity["held_out"] = source.identity
        measured = HeldOut(source, tokenizer, context, work / "tokens")
    return PreparedRun(tuple(prepared), found, kept, measured, identity)


def _decide(stage: HealStage, student: PreTrainedModel, device: torch.device) -> HealStage:
    """Sets precision and micro-batch of a stage."""
    config: Any = student.config
    if stage.context is not None and stage.context > config.max_position_embeddings:
        known = config.max_position_embeddings
        raise HealError(f"context: must be at most the model's {known} positions (got {stage.context})")
    assert stage.context is not None
    autocast = choose_precision(stage.precision, device, config.hidden_size)
    precision = "float32" if autocast is None else "bfloat16"
    micro_batch = choose_micro_batch(stage.micro_batch, stage.context, config, device)
    return stage.model_copy(update={"precision": precision, "micro_batch": micro_batch})


def _schedule(stage: HealStage, team: Team, first_sequence: int) -> Schedule:
    assert stage.context is not None
    assert stage.batch_tokens is not None
    assert stage.warmup is not None
    per_step = max(team.size, stage.batch_tokens // stage.context)
    return Schedule(
        tokens=stage.tokens,
        context=stage.context,
        sequences_per_step=per_step,
        peak=math.nan if stage.learning_rate is None else stage.learning_rate,
        warmup=stage.warmup,
        shape=stage.schedule,
        floor=stage.floor,
        first_sequence=first_sequence,
    )


def _budget(stages: Sequence[HealStage], index: int) -> int:
    """Returns the tokens of all stages that read the data in the same form as one stage, because they share them."""
    return sum(stage.tokens for stage in stages if stage.data == stages[index].data)


def _find_teacher(model: Source, wish: str | Path | Source | None) -> Source:
    if wish is not None:
        return wish if isinstance(wish, Source) else locate(wish)
    if model.read_config().get("model_type") == MODEL_TYPE:
        return provenance.teacher(model.fetch())
    return model


def _match_tokens(model: Source, tokenizer: PreTrainedTokenizerBase, teacher: Source) -> KeptTokens | None:
    """Returns the tokens that a student keeps of the teacher's vocabulary; None if both have the same vocabulary.

    A teacher without a tokenizer is accepted.

    Raises:
        SourceError: The teacher has other tokens.
    """
    kept = read_kept_tokens(model.fetch_companions())
    if not offers_tokenizer(teacher.fetch_companions()):
        size = teacher.read_config().get("vocab_size")
        return kept if kept is not None and kept.size < kept.source_size == size else None
    mine, other = tokenizer.get_vocab(), load_tokenizer(teacher).get_vocab()
    different = sorted(token for token in mine.keys() | other.keys() if mine.get(token) != other.get(token))
    if not different:
        return None
    if kept is not None and kept.is_cut_of(mine, other):
        return kept
    raise SourceError(
        f"{teacher.where}: a teacher with the student's tokenizer is required ({len(different):,} tokens differ, "
        f"such as {different[0]!r}); choose one of the same family"
    )


def _hash_weights(model: Source) -> str:
    # On the hub a commit has no hash of its files before they are here.
    found = locate(model.fetch()).hash_files()
    assert found is not None
    return found
