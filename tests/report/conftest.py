"""Runs made of a tiny folded model and of made-up figures, so that pages are tested without a run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refold.conversion.convert import ConvertOptions, convert
from refold.evaluation.result import Comparison, DataFile, Evaluation, ExitScores, KindScores, Machine, ModelFacts
from refold.report.opening import read_model
from refold.report.record import HealLog, NamedEvaluation, NamedScorecard, ReportRun, points_of
from refold.scorecard.record import (
    BranchScore,
    ExitChoice,
    ExitSection,
    NoiseScore,
    NotRun,
    RecallScore,
    RecallSection,
    Scorecard,
    SpeedSection,
    TaskScore,
    TaskSection,
)
from refold.sources.measurements import (
    Influence,
    LinearSpectrum,
    MeasuredText,
    Measurements,
    Similarity,
    TyingSpectra,
)

NASTY = """joint <b>&"x"</b> 'y' ]]> $a_b$"""
"""A name that would break HTML, SVG or mathematics if it were not escaped."""
MACHINE = Machine(device="cpu", device_name="x86_64", cpus=2, torch_threads=1, system="Linux")


def facts(name: str, weight_bytes: int) -> ModelFacts:
    return ModelFacts(name=name, model_type="refold", parameters=10, weight_bytes=weight_bytes, dtype="float32")


@pytest.fixture(scope="session")
def folded(make_source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A relaxed fold of four layers with an exit, and factors in every linear."""
    out = tmp_path_factory.mktemp("folded") / "model"
    recipe = {
        "fold": {"loops": 2},
        "relax": {"rank": 4, "init": "svd"},
        "factor": {"parameters": 0.5, "weight": "none"},
        "exits": {"at": "loops"},
    }
    convert(make_source(), out, recipe, options=ConvertOptions(command="refold convert <source>"))
    return out


@pytest.fixture(scope="session")
def evaluate_as(make_evaluation: Callable[..., Any]) -> Callable[..., Evaluation]:
    """Makes the evaluation of a model of a size and a loss beside its source of 400 bytes and 1.25 bits per byte."""

    def make(name: str, weight_bytes: int, loss: float, **fields: Any) -> Evaluation:
        against = Comparison(
            model=facts("models/source", 400),
            bits_per_byte=1.25,
            bits_per_byte_error=0.1,
            perplexity=5.0,
            accuracy=0.6,
            difference=loss - 1.25,
            difference_error=0.0123,
            agreement=0.7,
            kl=0.3,
        )
        data = (DataFile(name="texts/held out.txt", bytes=70, sha256="0" * 64),)
        plain = {"model": facts(name, weight_bytes), "data": data, "bits_per_byte": loss, "against": against}
        return make_evaluation(**{**plain, **fields})

    return make


def make_card(name: str, text: Evaluation | None, shift: float = 0.0) -> Scorecard:
    """Makes a scorecard with every section."""
    recalled = [
        RecallScore(
            kind=kind,
            length=length,
            depth=None if kind == "copying" else 0.5,
            accuracy=0.9 - length / 2000 - shift,
            exact=0.5,
            num_items=8,
            error=0.03,
            right=(1.0,) * 8,
        )
        for kind in ("copying", "passkey")
        for length in (64, 256, 1024)
    ]
    tasks = [
        TaskScore(
            name=task,
            metric="acc",
            value=value - shift,
            error=0.02,
            chance=0.25,
            metrics={"acc": value - shift},
            shots=0,
            num_items=50,
            num_available=500,
            version="1",
            items=("a",) * 50,
            right=(1.0,) * 50,
        )
        for task, value in (("piqa", 0.61), ("arc_easy", 0.43))
    ]
    rules = (
        ("exit after 2", 2.0, 1.9),
        ("oracle", 2.6, 1.3),
        ("calibrated at 0.01", 3.1, 1.44),
        ("full depth", 4.0, 1.4),
    )
    choices = tuple(
        ExitChoice(rule=rule, mean_depths=depths, bits_per_byte=loss + shift, agreement=0.8, accuracy=0.4)
        for rule, depths, loss in rules
    )
    speed = SpeedSection(
        prompt_tokens=16,
        new_tokens=32,
        first_token=0.0125,
        tokens_per_second=123.4,
        peak_memory=1_234_567,
        weight_bytes=300,
        state_bytes=77,
        batch_tokens_per_second={1: 120.0, 8: 480.0},
        repeats=3,
        threads=1,
        dtype="float32",
    )
    return Scorecard(
        model=facts(name, 300),
        text=text,
        tasks=TaskSection(
            tasks=tuple(tasks), average=0.52 - shift, average_error=0.014, harness="lm-eval 0.4", seconds=1
        ),
        recall=RecallSection(scores=tuple(recalled), seed=0, seconds=1),
        exits=ExitSection(depths=(2,), num_depths=4, choices=choices),
        branches=(BranchScore(branch="all linear", bits_per_byte=2.0, difference=0.6, difference_error=0.01),),
        noise=(
            NoiseScore(kind="swapped letters", share=0.1, bits_per_byte=1.7, difference=0.3, difference_error=None),
        ),
        speed=speed,
        not_run=(NotRun(section="branches", why="no hybrid <at all>"),),
        settings={},
        machine=MACHINE,
        versions={"refold": "9.9"},
        command="refold evaluate 'a b' --recall",
        time="2026-01-02T03:04:05",
    )


def make_log(name: str, shift: float = 0.0) -> HealLog:
    """Makes a log of two stages, with a skipped step and held-out text."""
    steps = [
        {
            "step": step,
            "tokens": 512 * step,
            "loss": None if step == 7 else 3.0 - step / 50 + shift,
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_second": 100.0,
            "skipped": step == 7,
            "stage": 1 + (step > 20),
            **({"held_out": 1.5 - step / 100 + shift} if step % 10 == 0 else {}),
        }
        for step in range(1, 31)
    ]
    return HealLog(name, tuple(steps))


@pytest.fixture(scope="session")
def measured(folded: Path) -> Measurements:
    """Measurements of four layers."""
    distances = tuple(tuple(abs(one - other) / 4 for other in range(4)) for one in range(4))
    streams = tuple(tuple(abs(one - other) / 9 for other in range(5)) for one in range(5))
    model = read_model(folded, "model")
    assert model.plan is not None
    spectrum = LinearSpectrum(lost=0.5, kept=(0.2, 0.9))
    return Measurements(
        source=model.plan.source,
        text=MeasuredText(kind="text", name="a <text>", tokens=1000, context=10, seed=0),
        influence=Influence(block=(0.9, 0.1, 0.05, 0.3), attention=(0.2, 0.1, 0.02, 0.1), mlp=(0.5, 0.1, 0.03, 0.2)),
        similarity=Similarity(weights={"q_proj": distances}, streams=streams),
        spectra=(
            TyingSpectra(
                pattern="cycle", loops=2, groups=((0, 2), (1, 3)), shares=(0.1, 0.5), linears={"q_proj": spectrum}
            ),
        ),
    )


@pytest.fixture(scope="session")
def bare(folded: Path) -> ReportRun:
    """A run of a model folder alone."""
    return ReportRun("bare", "model", folded, models=(read_model(folded, "bare"),))


@pytest.fixture(scope="session")
def whole(folded: Path, evaluate_as: Callable[..., Evaluation], measured: Measurements) -> ReportRun:
    """A run with everything that a report can show, and names that need escaping."""
    scores = ExitScores(
        depths=2, bits_per_byte=1.77, perplexity=7.0, accuracy=0.3, agreement=0.5, kl=0.4, gate_accuracy=0.9
    )
    kind = KindScores(
        name="prose",
        documents=1,
        tokens=20,
        bytes=70,
        bits_per_byte=1.41,
        bits_per_byte_error=0.2,
        perplexity=6.0,
        accuracy=0.5,
    )
    healed = evaluate_as("out/model", 300, 1.375, exits=(scores,), kinds=(kind,))
    evaluations = (
        NamedEvaluation(NASTY, healed),
        NamedEvaluation("pruned to the same size", evaluate_as("out/pruned", 310, 1.625)),
        NamedEvaluation("source in int8", evaluate_as("models/source", 120, 1.2501)),
    )
    cards = (
        NamedScorecard(NASTY, make_card("out/model", healed)),
        NamedScorecard("pruned to the same size", make_card("out/pruned", None, 0.1)),
    )
    return ReportRun(
        name=NASTY,
        kind="run",
        path=folded.parent,
        source="models/source",
        line=f"{NASTY}: 25% smaller",
        facts=(("budget <1>", "a & b"),),
        notes=("a note with <tags>",),
        models=(replace(read_model(folded, NASTY)),),
        points=points_of(evaluations),
        logs=(make_log(NASTY), make_log("pruned to the same size", 0.4)),
        evaluations=evaluations,
        scorecards=cards,
        measurements=measured,
    )
