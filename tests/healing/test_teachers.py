"""Teachers of students that keep some of the teacher's tokens."""

from pathlib import Path

import numpy as np
import pytest

from refold.conversion.convert import ConvertOptions, convert
from refold.data.readers import from_documents
from refold.errors import SourceError
from refold.healing import teachers
from refold.healing.heal import heal
from refold.healing.log import StepRecord
from refold.healing.run import HealOptions
from refold.modeling.load import load_model
from refold.recipe.heal import HealStage
from refold.vocabulary.kept_tokens import KeptTokens, read_kept_tokens
from refold.vocabulary.rows import cut_model

TEXT = ["The sea was calm that night, and the moon lay on it. " * 12, "It was the best of times. " * 12]


@pytest.fixture(scope="module")
def models(make_model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source, out = make_model(), tmp_path_factory.mktemp("cut") / "model"
    recipe = {"vocabulary": {"multiple": 1}}
    convert(source, out, recipe, options=ConvertOptions(allow_larger=True), calibration=TEXT)
    return source, out


def run(model: Path, out: Path, objective: dict, **arguments) -> list[StepRecord]:
    """The records of four steps."""
    seen: list[StepRecord] = []
    stage = {"objective": objective, "tokens": 128, "context": 16, "batch_tokens": 32, "learning_rate": 1e-3}
    options = HealOptions(device="cpu", on_step=seen.append, quiet=True)
    heal(model, out, from_documents(TEXT), HealStage.model_validate(stage), options=options, **arguments)
    return seen


@pytest.mark.parametrize("objective", [{"distil": {}}, {"distil": {"top_k": 8}}])
def test_a_student_of_the_same_weights_has_no_distance_to_its_teacher(objective, models, tmp_path):
    _, cut = models
    first, *later = run(cut, tmp_path / "out", objective)
    assert abs(first.objectives["forward_kl"]) < (1e-5 if objective == {"distil": {}} else 1e-2)
    assert later[-1].objectives["forward_kl"] > abs(first.objectives["forward_kl"])
    before, after = read_kept_tokens(cut), read_kept_tokens(tmp_path / "out")
    assert before is not None
    assert after is not None
    assert after.ids.tolist() == before.ids.tolist()
    assert load_model(tmp_path / "out", device="cpu").config.vocab_size == before.size


def test_control_a_teacher_with_other_rows_has_a_distance(models, tmp_path, monkeypatch):
    _, cut = models

    def shifted(model, kept):
        ids = np.array([*range(kept.size)])
        return cut_model(model, KeptTokens(ids, kept.source_size))

    monkeypatch.setattr(teachers, "cut_model", shifted)
    first, *_ = run(cut, tmp_path / "out", {"distil": {}})
    assert first.objectives["forward_kl"] > 1e-3


def test_a_teacher_that_is_trained_first_is_cut_afterwards(models, tmp_path):
    _, cut = models
    seen: list[StepRecord] = []
    stage = {"objective": {"distil": {}}, "tokens": 64, "context": 16, "batch_tokens": 32, "learning_rate": 1e-3}
    options = HealOptions(device="cpu", on_step=seen.append, quiet=True)
    made = HealStage.model_validate({**stage, "teacher_tokens": 64})
    heal(cut, tmp_path / "out", from_documents(TEXT), made, options=options)
    assert seen[-1].objectives["forward_kl"] > 0


def test_a_teacher_with_other_tokens_is_refused(models, tmp_path, with_swapped_tokens):
    source, cut = models
    other = with_swapped_tokens(source, tmp_path / "other")
    with pytest.raises(SourceError, match="a teacher with the student's tokenizer is required"):
        run(cut, tmp_path / "out", {"distil": {}}, teacher=other)
