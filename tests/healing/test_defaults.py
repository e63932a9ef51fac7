"""The rule for settings that a stage leaves open, and its way into a run."""

import json
import math
import re

import pytest
import torch

from refold.checkpoint import provenance
from refold.healing.defaults import (
    choose_batch,
    choose_learning_rate,
    choose_warmup,
    complete_stage,
    count_steps,
    describe_stage,
    excess_loss,
)
from refold.healing.probe import probe
from refold.healing.schedule import Schedule
from refold.modeling.load import load_model
from refold.recipe.heal import HealStage
from refold.scoring.predict import head_of


@pytest.mark.parametrize(
    ("tokens", "batch"), [(1, 512), (20_000, 512), (100_000, 512), (1_000_000, 512), (5_000_000, 4096), (1e9, 16_384)]
)
def test_the_batch_leaves_a_thousand_steps_where_it_can(tokens, batch):
    assert choose_batch(int(tokens)) == batch


@pytest.mark.parametrize(("steps", "share"), [(1, 0.1), (40, 0.1), (400, 0.05), (10_000, 0.02)])
def test_the_warm_up_is_twenty_steps_within_bounds(steps, share):
    assert choose_warmup(steps) == share


def test_far_starts_and_narrow_models_get_higher_rates():
    assert choose_learning_rate(64, 2.0) == 2e-3
    assert choose_learning_rate(512, 2.0) == 5e-4  # eight times the width, a quarter of the rate
    assert choose_learning_rate(64, None) == choose_learning_rate(64, 0.0) == 3e-4
    rates = [choose_learning_rate(256, distance) for distance in (0.0, 0.05, 0.2, 2.0, 5.0)]
    assert rates == sorted(rates)
    assert rates[3] == rates[4]
    assert choose_learning_rate(1, 9.0) == 4e-3
    # SmolLM2-135M with 75% of its linear weights is healed best at 1e-4 to 2e-4.
    assert 1e-4 <= choose_learning_rate(576, 0.42) <= 2e-4
    assert choose_learning_rate(65_536, 0.0) == 2e-5


def test_without_a_teacher_only_a_loss_that_no_pretrained_model_has_counts_as_distance():
    assert excess_loss(3.0, 50_000) == 0
    assert excess_loss(math.log(50_000), 50_000) == pytest.approx(0.55 * math.log(50_000))


def test_keys_that_are_set_stay():
    stage = HealStage(tokens=20_000, batch_tokens=2048, context=128, warmup=0.0, learning_rate=1e-2)
    assert complete_stage(stage, 512) == stage
    some = complete_stage(HealStage(tokens=20_000, batch_tokens=2048), 4096)
    assert (some.batch_tokens, some.context, some.learning_rate) == (2048, 1024, None)


@pytest.mark.parametrize(
    ("tokens", "positions", "context"), [(20_000, 8192, 512), (20_000, 256, 256), (100, 8192, 100), (1e8, 8192, 1024)]
)
def test_the_context_fits_model_budget_and_batch(tokens, positions, context):
    assert complete_stage(HealStage(tokens=int(tokens)), positions).context == context


@pytest.mark.parametrize(
    ("tokens", "context", "batch"), [(1000, 30, 120), (20_000, 512, 512), (5, 8, 4), (999, 10, 64)]
)
def test_steps_are_those_of_the_schedule(tokens, context, batch):
    per_step = max(1, batch // context)
    schedule = Schedule(tokens=tokens, context=context, sequences_per_step=per_step, peak=1.0, warmup=0.0)
    assert count_steps(tokens, context, batch) == schedule.num_steps


def test_a_short_stage_says_so():
    short = HealStage(tokens=20_000, batch_tokens=16_384, context=512, warmup=0.02, learning_rate=3e-4)
    said = describe_stage(short)
    assert "2 steps of 16,384 tokens" in said
    assert "fewer than 200 steps heal little: give more tokens, or set heal.batch_tokens=512" in said
    smallest = describe_stage(short.model_copy(update={"batch_tokens": 512}), distance=0.25)
    assert smallest.endswith("give more tokens")
    assert "(the start is 0.25 nats per token from its target)" in smallest
    assert "fewer" not in describe_stage(short.model_copy(update={"tokens": 10_000_000}))


def test_the_rate_follows_the_measured_distance_and_is_recorded(healing, source, capfd):
    stage = {"learning_rate": None, "batch_tokens": None, "warmup": None, "tokens": 4000}
    result = healing(stage, quiet=False)
    (done,) = result.stages
    assert (done.batch_tokens, done.warmup, done.context) == (512, 0.1, 16)
    distance = _excess(healing, source)
    assert distance > 0.01
    width = load_model(source, device="cpu").config.hidden_size
    # The run's teacher computes in its stored bfloat16.
    assert done.learning_rate == pytest.approx(choose_learning_rate(width, distance), rel=0.05)
    recipe = provenance.read(healing.destination)[-1].recipe
    assert (recipe["learning_rate"], recipe["batch_tokens"]) == (done.learning_rate, 512)
    said = re.search(rf"learning rate {done.learning_rate:g} \(the start is (\S+) nats", capfd.readouterr().err)
    assert said is not None
    assert float(said[1]) == pytest.approx(distance, abs=0.02)
    assert max(record.learning_rate for record in healing.records) == pytest.approx(done.learning_rate)


def _excess(healing, source):
    """The distance by transformers' own loss, sequence for sequence of a run that learns nothing."""
    lines = []
    healing.hook = lambda record: lines.append(record)
    seen = healing({"learning_rate": 1e-30, "tokens": 4000, "batch_tokens": 4096}, destination=healing.work / "still")
    healing.hook = None
    teacher = healing(
        {"learning_rate": 1e-30, "tokens": 4000, "batch_tokens": 4096, "objective": "next_token"},
        model=source,
        destination=healing.work / "teacher",
    )
    assert seen.steps == teacher.steps == 1
    return lines[0].objectives["cross_entropy"] - teacher.losses["loss"]


def test_a_source_is_near_itself_and_gets_the_lowest_rate(healing, source):
    result = healing({"learning_rate": None}, model=source)
    assert result.learning_rates == (choose_learning_rate(load_model(source, device="cpu").config.hidden_size, 0.0),)


def test_a_later_stage_is_measured_when_it_starts(healing):
    first = healing.stage(learning_rate=1e-2, tokens=48 * 64)
    healing(stages=[first, healing.stage(learning_rate=None, tokens=64)])
    alone = healing(stages=[healing.stage(learning_rate=None, tokens=64)], destination=healing.work / "alone")
    assert healing.records[48].learning_rate < alone.learning_rates[0]


def test_measuring_changes_no_weight_and_no_random_number(healing, tmp_path, weights):
    rate = healing({"learning_rate": None}, destination=tmp_path / "chosen").learning_rates[0]
    healing({"learning_rate": rate})
    chosen, given = weights(tmp_path / "chosen"), weights(healing.destination)
    assert all(torch.equal(chosen[name], given[name]) for name in chosen)


def test_a_dry_run_shows_the_settings(healing, documents):
    stage = healing.stage(tokens=20_000, learning_rate=None, batch_tokens=None, warmup=None)
    found = probe(healing.model, documents, [stage, stage], device="cpu", quiet=True)
    first, second = found.settings
    assert "stage 1: 40 steps of 512 tokens" in first
    assert "nats per token from its target" in first
    assert "learning rate chosen when the stage starts" in second
    assert found.line.splitlines()[1:] == [first, second]
    json.dumps(vars(found))


def test_text_without_targets_leaves_the_distance_unknown(healing):
    from refold.data.packing import IGNORED, PackedSequence
    from refold.healing.distance import measure_distance

    model = load_model(healing.model, device="cpu")
    ids = torch.zeros(1, 4, dtype=torch.int64)
    batch = PackedSequence(ids, torch.arange(4)[None], torch.full_like(ids, IGNORED))
    assert measure_distance(model, None, batch, None) is None
    known = measure_distance(model, None, batch._replace(labels=ids), None)
    assert known is not None
    assert known.vocab_size == head_of(model).vocab_size
