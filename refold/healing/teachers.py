"""The teachers of a run: the source, or the source trained first; in memory, or as stored predictions."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from refold.checkpoint.locate import Source
from refold.healing.precision import attend_in_float32
from refold.healing.prepared import PreparedStage
from refold.healing.student import Teacher, teacher_wants
from refold.healing.teacher_store import StoreContents, TeacherPass, TeacherStore
from refold.healing.team import Team
from refold.modeling.load import load_model
from refold.recipe.heal import HealStage
from refold.vocabulary.kept_tokens import KeptTokens
from refold.vocabulary.rows import cut_model

TrainTeacher = Callable[[Source, Path, HealStage], None]
"""Function that trains a source for a stage and writes it into a folder."""


class Teachers:
    """Loads the teachers of a run for its stages, at most one at a time.

    Args:
        source: source of the student, or the teacher named by the user; None if no stage has a teacher.
        kept: the tokens that the student keeps of the teacher's vocabulary, to which the teacher is cut; None: all.
        work: work folder, for trained teachers and stored predictions.
        team: the processes of the run.
        train: trains a teacher.
        tell: called with each line for the user.
    """

    def __init__(
        self,
        source: Source | None,
        kept: KeptTokens | None,
        work: Path,
        team: Team,
        train: TrainTeacher,
        tell: Callable[[str], None],
    ):
        self._kept = kept
        self._source, self._work, self._team, self._train, self._tell = source, work, team, train, tell
        self._loaded: tuple[tuple[object, ...], PreTrainedModel] | None = None

    def open(self, stage: PreparedStage) -> tuple[Teacher | None, TeacherStore | None]:
        """Returns the teacher of a stage and its stored predictions; each is None if the stage does not read it."""
        wants = teacher_wants(stage.objectives)
        if not stage.wants_teacher:
            self._loaded = None
            return None, None
        store = self._open_store(stage)
        if not wants:
            self._loaded = None  # stored predictions need no teacher in memory
            return None, store
        return Teacher(self.load(stage), stage.autocast, wants), store

    def model(self, stage: PreparedStage) -> PreTrainedModel | None:
        """Returns the teacher's model of a stage, for checks; None if the stage needs no teacher in memory."""
        return self.load(stage) if teacher_wants(stage.objectives) else None

    def load(self, stage: PreparedStage) -> PreTrainedModel:
        """Loads and returns the teacher's model of a stage; trains it first if the stage has `teacher_tokens`."""
        assert self._source is not None
        tokens = stage.stage.teacher_tokens
        attention = _attention(stage)
        key = (tokens, attention, stage.autocast)
        if self._loaded is not None and self._loaded[0] == key:
            return self._loaded[1]
        self._loaded = None
        where: Source | Path = self._source
        if tokens is not None:
            where = self._work / f"teacher-{tokens}"
            if not where.exists():
                self._tell(f"training the teacher for {tokens:,} tokens")
                plain = {"objective": {"next_token": {}}, "tokens": tokens, "train": ("all",), "freeze": ()}
                plain |= {"thaw": None, "rates": {}, "teacher_tokens": None}
                self._train(self._source, where, HealStage.model_validate({**stage.stage.model_dump(), **plain}))
        model = load_model(where, device=self._team.device, attn_implementation=attention)
        model = model if self._kept is None else cut_model(model, self._kept)
        if attention is None and stage.autocast is not None and self._team.device.type == "cpu":
            attend_in_float32(model)
        self._loaded = (key, model)
        return model

    def _open_store(self, stage: PreparedStage) -> TeacherStore | None:
        top_k = max((objective.stored_top_k or 0 for objective in stage.objectives.values()), default=0)
        if not top_k:
            return None
        spec, schedule = stage.stage, stage.schedule
        assert spec.context is not None
        assert spec.micro_batch is not None
        assert self._source is not None
        if spec.teacher_tokens is not None:
            self.load(stage)  # trained by all processes together, before one of them writes
        contents = StoreContents(
            identity=f"{self._source.fingerprint()} {spec.teacher_tokens} {spec.precision} {stage.data.identity}",
            first_sequence=schedule.first_sequence,
            num_sequences=schedule.num_sequences,
            context=spec.context,
            k=top_k,
            vocab_size=self._source.read_config()["vocab_size"] if self._kept is None else self._kept.size,
        )
        folder = self._work / "teacher-predictions"
        teacher_pass = TeacherPass(
            lambda: Teacher(self.load(stage), stage.autocast, frozenset({"predictions"})),
            stage.data,
            spec.micro_batch,
            self._team.device,
        )
        made = self._team.first(lambda: TeacherStore.build(folder, contents, teacher_pass, tell=self._tell))
        return TeacherStore(folder, contents) if made is None else made


def _attention(stage: PreparedStage) -> str | None:
    wishes = {objective.teacher_attention for objective in stage.objectives.values()} - {None}
    return wishes.pop() if wishes else None
