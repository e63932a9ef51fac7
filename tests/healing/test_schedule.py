import pytest

from refold.healing.schedule import FLOOR, Schedule


def test_steps_cover_every_sequence_once():
    schedule = Schedule(tokens=1000, context=30, sequences_per_step=4, peak=1.0, warmup=0.0)
    assert schedule.num_sequences == 34
    assert schedule.num_steps == 9
    assert [position for step in range(9) for position in schedule.sequences(step)] == list(range(34))
    assert [schedule.tokens_after(steps) for steps in (0, 1, 8, 9)] == [0, 120, 960, 1000]


def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth():
    schedule = Schedule(tokens=100, context=1, sequences_per_step=1, peak=2.0, warmup=0.1)
    rates = [schedule.learning_rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == rates[9] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[54] == pytest.approx(2.0 * (1 + FLOOR) / 2)
    assert rates[-1] == pytest.approx(2.0 * FLOOR)


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_a_single_step_has_a_rate(warmup):
    schedule = Schedule(tokens=5, context=8, sequences_per_step=4, peak=1.0, warmup=warmup)
    assert schedule.num_steps == 1
    assert 0 < schedule.learning_rate(0) <= 1.0
