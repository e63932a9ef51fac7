"""Speed: both models run by the engine in turns, figures are of the right quantities, reasons are told."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from refold.conversion.convert import ConvertOptions, convert
from refold.evaluation.reference import Reference
from refold.evaluation.settings import EvaluationSettings
from refold.scorecard import speed
from refold.scorecard.job import ScoreJob, SectionNotRun
from refold.scorecard.peak_memory import MemoryQuestion, PeakMemory, measure_peak_memory
from refold.scorecard.record import SpeedSection
from refold.scorecard.speed import measure_speed

AMOUNTS = {"prompt_tokens": 12, "new_tokens": 4, "repeats": 2, "batches": (1, 3)}


@pytest.fixture(scope="module")
def source(make_model: Callable[..., Path]) -> Path:
    return make_model("llama")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[MemoryQuestion]:
    """Replaces the fresh process, which takes seconds to import torch; one test runs it."""
    questions: list[MemoryQuestion] = []

    def answer(question: MemoryQuestion) -> PeakMemory:
        questions.append(question)
        return PeakMemory(10, 30)

    monkeypatch.setattr(speed, "measure_peak_memory", answer)
    return questions


def test_model_and_source_are_measured_alike(
    source: Path, make_job: Callable[..., ScoreJob], asked: list[MemoryQuestion], tmp_path: Path
) -> None:
    fold = tmp_path / "fold"
    convert(source, fold, {"fold": {"loops": 2}}, options=ConvertOptions(allow_larger=True))
    job = replace(make_job(fold, **AMOUNTS), against=Reference(source))
    found = measure_speed(job)
    other = found.against
    assert other is not None
    assert other.against is other.ratio is None
    for each in (found, other):
        assert (each.prompt_tokens, each.new_tokens, each.repeats) == (12, 4, 2)
        assert 0 < each.first_token < 60
        assert each.speed_range is not None
        assert 0 < each.speed_range[0] <= each.tokens_per_second <= each.speed_range[1]
        assert set(each.batch_tokens_per_second) == {1, 3}
        assert (each.base_memory, each.peak_memory, each.dtype) == (10, 30, "float32")
        # Two key-value heads of 8 numbers in float32 at four depths, for 16 tokens: folding does not change it.
        assert each.state_bytes == 16 * 4 * 2 * 2 * 8 * 4
    assert found.ratio is not None
    assert found.ratio_range is not None
    assert found.ratio_range[0] <= found.ratio <= found.ratio_range[1]
    assert found.weight_bytes < other.weight_bytes
    assert SpeedSection.model_validate_json(found.model_dump_json()) == found
    assert [(question.model, question.weights) for question in asked] == [(str(fold), "auto"), (str(source), "auto")]


@pytest.mark.long
def test_the_process_of_the_peak_holds_the_weights(source: Path) -> None:
    found = measure_peak_memory(MemoryQuestion(str(source), "auto", "cpu", [3, 4, 5], 2, 1))
    assert found.why == ""
    assert found.base is not None
    assert found.peak is not None
    assert 10**7 < found.base < found.peak < found.base + 10**9


def test_a_process_that_fails_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refold.scorecard.peak_memory.sys.executable", "/bin/false")
    found = measure_peak_memory(MemoryQuestion("nowhere", "auto", "cpu", [3], 2, 1))
    assert found.peak is found.base is None
    assert found.why == "the process that measures it ended with 1: nothing"


def test_a_model_in_memory_has_no_peak(
    source: Path, make_job: Callable[..., ScoreJob], asked: list[MemoryQuestion], tmp_path: Path
) -> None:
    from refold.modeling.load import load_model

    fold = tmp_path / "fold"
    convert(source, fold, {}, options=ConvertOptions(allow_larger=True))
    found = measure_speed(make_job(load_model(fold), **AMOUNTS))
    assert found.peak_memory is None
    assert found.notes == ("peak memory: a model in memory cannot be loaded by a fresh process",)
    assert asked == []
    # The engine takes folded models from memory alone.
    with pytest.raises(SectionNotRun, match="a folder, a hub id or a folded model is required"):
        measure_speed(make_job(load_model(source), **AMOUNTS))


def test_long_prompts_are_cut_to_the_positions(
    source: Path, make_job: Callable[..., ScoreJob], asked: list[MemoryQuestion]
) -> None:
    long = {**AMOUNTS, "prompt_tokens": 400, "batches": (1,), "repeats": 1}
    assert measure_speed(make_job(source, **long)).prompt_tokens == 252
    with pytest.raises(SectionNotRun, match=r"more than 300 positions are required \(the model has 256\)"):
        measure_speed(make_job(source, **{**long, "new_tokens": 300}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"dtype": torch.float64}, "got float64"), ({"quantise": "int8g9"}, "got int8g9")],
    ids=["dtype", "quantise"],
)
def test_forms_of_weights_that_the_engine_lacks_are_named(
    source: Path, make_job: Callable[..., ScoreJob], asked: list[MemoryQuestion], fields: dict[str, Any], message: str
) -> None:
    job = make_job(source, **AMOUNTS)
    text = EvaluationSettings(**fields)
    with pytest.raises(SectionNotRun, match=f"weights in one of the engine's forms are required.*{message}"):
        measure_speed(replace(job, settings=replace(job.settings, text=text)))
