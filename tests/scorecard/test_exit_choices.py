"""Exits by rule: figures of a plain loop, an oracle that no rule beats, thresholds that keep their tolerance."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refold.conversion.convert import ConvertOptions, convert
from refold.engine.calibration import CalibrateOptions, calibrate
from refold.engine.exit_table import ExitTable
from refold.modeling.model import RefoldForCausalLM
from refold.scorecard.exit_choices import choose_thresholds, measure_exits
from refold.scorecard.job import ScoreJob, SectionNotRun
from refold.scorecard.openings import OpeningAmounts, read_openings
from refold.scorecard.record import ExitChoice, ExitSection


@pytest.fixture(scope="module")
def fold(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exits") / "fold"
    convert(make_model("llama"), folder, {"exits": {"at": [1, 2]}}, options=ConvertOptions(allow_larger=True))
    return folder


@pytest.fixture(scope="module")
def job(fold: Path, make_job: Callable[..., ScoreJob], texts: list[str]) -> ScoreJob:
    return make_job(fold, texts, exit_documents=8, opening=40, exit_tolerances=(0.1, 0.9))


@pytest.fixture(scope="module")
def found(job: ScoreJob) -> ExitSection:
    return measure_exits(job)


def by_rule(section: ExitSection) -> dict[str, ExitChoice]:
    return {each.rule: each for each in section.choices}


def test_fixed_exits_oracle_and_full_depth_equal_a_plain_loop(job: ScoreJob, found: ExitSection) -> None:
    text = read_openings(job, OpeningAmounts(8, 40))
    model = job.subject.model
    assert isinstance(model, RefoldForCausalLM)
    sums = {rule: np.zeros(4) for rule in ("exit after 2", "exit after 3", "full depth", "oracle")}
    num_bytes = num_tokens = 0
    # Every other document, from the second on: the others choose thresholds.
    for index in (1, 3, 5, 7):
        ids = torch.from_numpy(text.document(index).astype(np.int64))
        num_bytes += int(text.byte_offsets[index + 1] - text.byte_offsets[index])
        with torch.no_grad():
            depths = {2: model(ids[None], exit_depth=2), 3: model(ids[None], exit_depth=3), 4: model(ids[None])}
        logits = {depth: out.logits[0].double() for depth, out in depths.items()}
        for place in range(len(ids) - 1):
            num_tokens += 1
            label = int(ids[place + 1])
            best = {depth: int(each[place].argmax()) for depth, each in logits.items()}
            chosen = {"exit after 2": 2, "exit after 3": 3, "full depth": 4}
            chosen["oracle"] = next(depth for depth in (2, 3, 4) if best[depth] == best[4])
            for rule, depth in chosen.items():
                nll = -float(logits[depth][place].log_softmax(0)[label])
                sums[rule] += (nll, depth, best[depth] == best[4], best[depth] == label)
    assert (found.num_documents, found.num_tokens) == (4, num_tokens)
    assert len(set(found.documents)) == 4
    assert sum(found.bytes) == num_bytes
    assert ExitSection.model_validate_json(found.model_dump_json()) == found
    rules = by_rule(found)
    for rule, (nll, depths, agreeing, right) in sums.items():
        here = rules[rule]
        assert here.bits_per_byte == pytest.approx(nll / np.log(2) / num_bytes, rel=1e-5)
        assert len(here.nats) == 4
        assert sum(here.nats) == pytest.approx(nll, rel=1e-5)
        assert here.mean_depths == pytest.approx(depths / num_tokens)
        assert here.agreement == pytest.approx(agreeing / num_tokens)
        assert here.accuracy == pytest.approx(right / num_tokens)
        assert sum(here.shares) == pytest.approx(1)
    # An exit differs from the full depth, so that the comparison can fail.
    assert rules["exit after 2"].agreement < 0.9


def test_no_rule_that_keeps_every_token_beats_the_oracle(found: ExitSection) -> None:
    rules = by_rule(found)
    oracle = rules["oracle"]
    assert oracle.agreement == 1.0
    assert oracle.accuracy == rules["full depth"].accuracy
    assert 2 < oracle.mean_depths < 4
    for each in found.choices:
        # Every token that a rule keeps cannot leave before the oracle's exit.
        assert each.agreement < 1.0 or each.mean_depths >= oracle.mean_depths
    assert oracle.difference != 0.0
    assert rules["full depth"].difference == rules["full depth"].difference_error == 0.0


def test_a_larger_tolerance_runs_fewer_depths(found: ExitSection) -> None:
    rules = by_rule(found)
    strict, lax = rules["thresholds at 0.1"], rules["thresholds at 0.9"]
    assert lax.mean_depths < strict.mean_depths <= 4
    assert lax.agreement <= strict.agreement


def test_thresholds_keep_their_tolerance_where_they_were_chosen() -> None:
    numbers = np.random.default_rng(0)
    count = 4000
    sure = numbers.random((2, count))
    # An exit that is surer is right more often.
    differs = numbers.random((2, count)) > sure
    table = ExitTable((1, 2), sure, differs, np.zeros(count, dtype=np.int64), np.repeat(np.arange(8), 500), 8)
    chosen = choose_thresholds(table, 0.1)
    for index, depth in enumerate((1, 2)):
        assert table.losses(index, chosen[depth]).mean() <= 0.05
        # The loss of the threshold t is (1 - t)^2 / 2, so it is used up at t = 0.684.
        assert chosen[depth] == pytest.approx(1 - 0.1**0.5, abs=0.03)
    leaving = table.leaving(chosen)
    wrong = differs[leaving, np.arange(count)] & (leaving >= 0)
    assert wrong.mean() <= 0.1
    assert choose_thresholds(table, 0.0).get(1, 1.0) > 0.99


def test_stored_thresholds_are_used_where_they_fit(
    fold: Path, make_job: Callable[..., ScoreJob], texts: list[str], found: ExitSection, tmp_path: Path
) -> None:
    assert found.notes == ("calibrated: the folder has no exits.json; `refold calibrate` writes it",)
    folder = shutil.copytree(fold, tmp_path / "fold")
    options = CalibrateOptions(tolerance=0.9, confidence=0.1, live_documents=0)
    thresholds = calibrate(folder, texts, options).thresholds
    thresholds.write(folder)
    again = make_job(folder, texts, exit_documents=8, opening=40, exit_tolerances=())
    section = measure_exits(again)
    calibrated = by_rule(section)["calibrated at 0.9"]
    assert section.notes == ()
    assert calibrated.mean_depths < 4
    # Thresholds of other weights are refused, and the reason is told.
    model: Any = again.subject.model
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    refused = measure_exits(again)
    assert "calibrated at 0.9" not in by_rule(refused)
    assert "thresholds of this model are required" in refused.notes[0]


def test_what_is_missing_is_named(
    fold: Path, make_model: Callable[..., Path], make_job: Callable[..., ScoreJob], texts: list[str]
) -> None:
    with pytest.raises(SectionNotRun, match="a model with exits is required"):
        measure_exits(make_job(make_model("llama"), texts))
    with pytest.raises(SectionNotRun, match="held-out text is required"):
        measure_exits(make_job(fold))
    (one, *_) = texts
    alone = measure_exits(make_job(fold, [one, ""], opening=40))
    assert alone.num_documents == 1
    assert "thresholds: not chosen, because there is one document alone" in alone.notes
