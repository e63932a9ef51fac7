import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from refold.conversion.convert import ConvertOptions, convert
from refold.data.readers import from_documents
from refold.errors import RefoldError, SourceError
from refold.evaluation.evaluate import evaluate
from refold.evaluation.settings import EvaluationSettings
from refold.modeling.load import load_model
from refold.scorecard import score as module
from refold.scorecard.job import ScoreJob, SectionNotRun
from refold.scorecard.record import BranchScore, RecallSection, Scorecard, SpeedSection
from refold.scorecard.score import score, score_each
from refold.scorecard.settings import ScoreSettings

TEXT = EvaluationSettings(context=32, stride=16, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def source(make_model) -> Path:
    return make_model()


@pytest.fixture(scope="module")
def folded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folded") / "out"
    convert(source, folder, {"fold": {"loops": 2}})
    return folder


def speed_of(job: ScoreJob) -> SpeedSection:
    plain: dict[str, Any] = {"prompt_tokens": 4, "new_tokens": 2, "first_token": 0.1, "peak_memory": None}
    plain |= {"weight_bytes": 1, "state_bytes": 1, "repeats": 1, "threads": 1, "dtype": "float32"}
    other = None if job.against is None else SpeedSection(tokens_per_second=7.0, **plain)
    return SpeedSection(tokens_per_second=9.0, against=other, **plain)


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[ScoreJob]]:
    """Sections that note their jobs: recall runs, exits have no meaning, branches of a folded model alone."""
    seen: dict[str, list[ScoreJob]] = {"recall": [], "exits": [], "branches": [], "speed": []}

    def recall(job: ScoreJob) -> RecallSection:
        seen["recall"].append(job)
        return RecallSection(scores=(), seed=job.settings.seed, seconds=0.0)

    def exits(job: ScoreJob) -> Any:
        raise SectionNotRun("the model has no exits")

    def branches(job: ScoreJob) -> tuple[BranchScore, ...]:
        return (BranchScore(branch="all", bits_per_byte=1.0, difference=0.0, difference_error=None),)

    def speed(job: ScoreJob) -> SpeedSection:
        seen["speed"].append(job)
        return speed_of(job)

    for name, run in (("recall", recall), ("exits", exits), ("branches", branches), ("speed", speed)):
        monkeypatch.setitem(module.SECTIONS, name, run)
    return seen


def figures(card: Scorecard) -> dict[str, Any]:
    assert card.text is not None
    return card.text.model_dump(exclude={"seconds", "tokens_per_second", "time"})


def test_the_text_of_a_scorecard_is_the_evaluation(source, folded, sentences):
    data = from_documents(sentences)
    cards = score([folded, source], data, ScoreSettings(TEXT), against=source)
    for model, card in zip((folded, source), cards, strict=True):
        expected = evaluate(model, data, TEXT, against=source)
        assert figures(card) == expected.model_dump(exclude={"seconds", "tokens_per_second", "time"})
        assert card.model == expected.model
        assert card.text is not None
        assert card.text.seconds.load > 0


def test_a_cut_vocabulary_is_compared_with_its_source(source, tmp_path: Path):
    texts = ["The sea was calm that night, and the moon lay on it. "]
    options = ConvertOptions(allow_larger=True)
    convert(source, tmp_path / "cut", {"vocabulary": {"multiple": 1}}, options=options, calibration=texts)
    (card,) = score([tmp_path / "cut"], texts, ScoreSettings(TEXT), against=source)
    assert card.text is not None
    assert card.text.against is not None
    assert card.text.against.kept_tokens == load_model(tmp_path / "cut", device="cpu").config.vocab_size


def test_a_generator_is_read_once_for_all_models(source, folded, sentences):
    one, other = score([source, folded], (text for text in sentences), ScoreSettings(TEXT))
    assert one.text is not None
    assert other.text is not None
    assert one.text.by_document is not None
    assert other.text.by_document is not None
    assert one.text.by_document.hashes == other.text.by_document.hashes
    assert len(one.text.by_document.hashes) == len(sentences)


def test_the_reference_is_loaded_once(source, folded, sentences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convert(source, tmp_path / "three", {"fold": {"loops": 4}})
    loaded: list[str] = []

    def opened(model: Any, *rest: Any, **options: Any) -> Any:
        loaded.append(str(model))
        return real(model, *rest, **options)

    from refold.evaluation import reference

    real = reference.open_subject
    monkeypatch.setattr(reference, "open_subject", opened)
    score([folded, tmp_path / "three"], from_documents(sentences), ScoreSettings(TEXT), against=source)
    assert loaded == [str(source)]


def test_a_section_that_cannot_run_says_why_and_the_others_go_on(source, folded, sections):
    settings = ScoreSettings(TEXT, recall=True, exits=True, branches=True, seed=4)
    (card,) = score([folded], settings=settings)
    assert card.text is None
    assert card.recall == RecallSection(scores=(), seed=4, seconds=0.0)
    assert [(each.section, each.why) for each in card.not_run] == [("exits", "the model has no exits")]
    assert len(card.branches) == 1
    assert card.settings["text"]["context"] == 32
    assert card.settings["seed"] == 4


def test_a_section_beside_text_gives_the_source_a_scorecard(source, folded, sentences, sections):
    settings = ScoreSettings(EvaluationSettings(32, 16, dtype="float32", device="cpu", quantise="int8"), recall=True)
    data = from_documents(sentences)
    model, own = score([folded], data, settings, against=source)
    assert [model.model.name, own.model.name] == [str(folded), str(source)]
    assert own.text is not None
    assert (own.text.against, own.recall) == (None, model.recall)
    assert (model.model.quantised, own.model.quantised) == ("int8", None)
    plain = evaluate(source, data, TEXT)
    assert own.text.by_document == plain.by_document
    assert sections["recall"][1].against is None
    # The source is a model already, or there is text alone: no card more.
    assert len(score([folded, source], settings=ScoreSettings(TEXT, recall=True), against=source)) == 2
    assert len(score([folded], data, ScoreSettings(TEXT), against=source)) == 1


def test_the_sources_speed_is_the_one_measured_in_turns(source, folded, sections):
    model, own = score([folded], settings=ScoreSettings(TEXT, recall=True, speed=True), against=source)
    assert model.speed is not None
    assert own.speed == model.speed.against
    assert own.speed is not None
    assert own.speed.tokens_per_second == 7.0
    assert len(sections["speed"]) == 1


def test_a_model_is_freed_before_the_next_one_loads(source, folded, monkeypatch: pytest.MonkeyPatch):
    alive: list[weakref.ref[torch.nn.Module]] = []

    def recall(job: ScoreJob) -> RecallSection:
        assert [ref() for ref in alive] == [None] * len(alive)
        alive.append(weakref.ref(job.subject.model))
        return RecallSection(scores=(), seed=0, seconds=0.0)

    monkeypatch.setitem(module.SECTIONS, "recall", recall)
    score([folded, source, folded], settings=ScoreSettings(TEXT, recall=True))
    assert len(alive) == 3


def test_a_later_failure_loses_no_scorecard(source, sections, make_source: Callable[..., Path]):
    # No tokenizer: the folder is whole, and only the text cannot be read.
    cards = score_each([source, make_source()], ["Some text of a few words."], ScoreSettings(TEXT))
    assert next(cards).model.name == str(source)
    with pytest.raises(SourceError, match="a tokenizer is required"):
        next(cards)


def test_mistakes_are_told_before_any_model_runs(source, sections, tmp_path: Path):
    with pytest.raises(
        RefoldError, match=r"a text or a section is required \(got neither\); give one of --data, --tasks"
    ):
        score([source])
    with pytest.raises(RefoldError, match=r"at least one model is required \(got none\)"):
        score([], settings=ScoreSettings(TEXT, recall=True))
    with pytest.raises(SourceError, match="nowhere"):
        score([source, tmp_path / "nowhere"], settings=ScoreSettings(TEXT, recall=True))
    with pytest.raises(RefoldError, match="arc_eazy"):
        score([source], settings=ScoreSettings(TEXT, recall=True, tasks=("arc_eazy",), task_data=tmp_path))
    assert sections["recall"] == []


def test_a_source_of_another_tokenizer_refuses_agreement(source, make_source, sentences):
    with pytest.raises(SourceError, match=r"evaluate each by itself and compare bits per byte and tasks with `refold"):
        score([source], from_documents(sentences), ScoreSettings(TEXT), against=make_source("llama"))


@pytest.mark.parametrize("setting", [{"limit": 3}, {"shots": 0}, {"task_data": Path("items")}], ids=str)
def test_settings_of_tasks_need_tasks(setting):
    (name,) = setting
    with pytest.raises(RefoldError, match=rf"{name}: tasks are required with it .*; name tasks: seven"):
        ScoreSettings(**setting)
    ScoreSettings(tasks=("piqa",), **setting)
