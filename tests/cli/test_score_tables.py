from typing import Any

import pytest

from refold.cli.score_tables import SECTION_TABLES, print_scorecard
from refold.evaluation.result import Machine, ModelFacts
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
from refold.scorecard.score import SECTIONS

SPEED: dict[str, Any] = {"prompt_tokens": 512, "new_tokens": 128, "repeats": 5, "threads": 2, "dtype": "float32"}


@pytest.fixture
def card() -> Scorecard:
    plain: dict[str, Any] = {"metrics": {}, "version": "1", "items": (), "right": (), "num_available": 1838}
    task = TaskScore(
        name="lambada_openai", metric="acc", value=0.5, error=0.0224, chance=None, shots=0, num_items=500, **plain
    )
    recall = RecallScore(
        kind="passkey", length=4096, depth=0.25, accuracy=0.875, exact=0.5, num_items=20, error=0.05, right=(),
        chance=0.001, gain=4.25,
    )  # fmt: skip
    exit_ = ExitChoice(rule="calibrated at 5%", mean_depths=7.25, bits_per_byte=1.2, agreement=0.96, accuracy=0.5)
    source = SpeedSection(
        first_token=0.5, tokens_per_second=20.0, peak_memory=10**9, weight_bytes=3 * 10**8, state_bytes=10**7, **SPEED
    )
    speed = SpeedSection(
        first_token=0.25, tokens_per_second=41.5, peak_memory=None, weight_bytes=10**8, state_bytes=10**6,
        batch_tokens_per_second={8: 120.0}, against=source, ratio=2.075, notes=("no peak",), **SPEED,
    )  # fmt: skip
    return Scorecard(
        model=ModelFacts(name="folded", model_type="refold", parameters=10, weight_bytes=40, dtype="float32"),
        tasks=TaskSection(tasks=(task,), average=0.5, average_error=0.02, harness="lm-eval 0.4.13", seconds=12.0),
        recall=RecallSection(scores=(recall,), seed=0, seconds=1.0, notes=("512 tokens: skipped",)),
        exits=ExitSection(depths=(4,), num_depths=12, choices=(exit_,), notes=("a line on exits",)),
        branches=(BranchScore(branch="all linear", bits_per_byte=1.5, difference=0.3, difference_error=0.01),),
        noise=(NoiseScore(kind="swapped letters", share=0.1, bits_per_byte=2, difference=0.8, difference_error=0.02),),
        speed=speed,
        not_run=(NotRun(section="tasks", why="lm-eval is not installed"),),
        settings={},
        machine=Machine(device="cpu", device_name="x86_64", cpus=2, torch_threads=1, system="Linux"),
        versions={},
        time="now",
    )


def test_every_section_is_printed_with_its_errors_within_80_columns(card, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_scorecard(card)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for expected in (
        "folded: 40 B",
        "lambada_openai acc 50.0% ± 2.2 - 0 500 of 1,838",
        "average 50.0% ± 2.0",
        "passkey 4,096 25% 87.5% ± 5.0 0.1% 50.0% +4.2 20",
        "512 tokens: skipped",
        "calibrated at 5% 7.25 of 12 1.2000 50.00% 96.00%",
        "a line on exits",
        "all linear 1.5000 +0.3000 ± 0.0100",
        "swapped letters 10% 2.0000 +0.8000 ± 0.0200",
        "first token after 512 250.0 ms 500.0 ms",
        "tokens per second 41.5 20.0",
        "peak memory - 1.0 GB",
        "with prefill, 8 at once 120.0 -",
        "2.08 times the source's tokens per second, the median of the rounds",
        "no peak",
        "tasks: not run: lm-eval is not installed",
    ):
        assert expected in lines, printed


def test_text_is_printed_as_ever_and_no_section_that_was_not_asked_for(card, make_evaluation, capsys):
    from refold.cli.evaluation_tables import print_evaluation

    text = make_evaluation()
    empty = {name: () if name in ("branches", "noise", "not_run") else None for name in (*SECTIONS, "not_run")}
    print_scorecard(card.model_copy(update={**empty, "text": text}))
    printed = capsys.readouterr().out
    print_evaluation(text)
    assert printed == capsys.readouterr().out


def test_every_section_has_a_table():
    assert SECTION_TABLES.keys() == SECTIONS.keys()
