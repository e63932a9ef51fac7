import pytest

from refold.healing.schedule import CONSTANT_TAIL, Schedule

FLOOR = 0.1


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


def test_a_warm_up_that_is_no_whole_number_of_steps_is_rounded_up():
    schedule = Schedule(tokens=10, context=1, sequences_per_step=1, peak=1.0, warmup=0.25)
    rates = [schedule.learning_rate(step) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])  # 2.5 steps are three
    assert rates[3] < 1.0


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_a_single_step_has_a_rate(warmup):
    schedule = Schedule(tokens=5, context=8, sequences_per_step=4, peak=1.0, warmup=warmup)
    assert schedule.num_steps == 1
    assert 0 < schedule.learning_rate(0) <= 1.0


def test_shapes_end_at_the_floor():
    def rates(shape):
        schedule = Schedule(100, 1, 1, peak=2.0, warmup=0.1, shape=shape, floor=0.25)
        return [schedule.learning_rate(step) for step in range(100)]

    for shape in ("cosine", "linear", "constant"):
        assert rates(shape)[-1] == pytest.approx(0.5), shape
        assert max(rates(shape)) == pytest.approx(2.0), shape
    linear, constant = rates("linear"), rates("constant")
    assert linear[54] == pytest.approx((2.0 + 0.5) / 2)
    flat = round(10 + 90 * (1 - CONSTANT_TAIL))
    assert constant[10:flat] == pytest.approx([2.0] * (flat - 10))
    assert constant[flat:] == sorted(constant[flat:], reverse=True)
    assert constant[flat] < 2.0


def test_a_later_stage_goes_on_where_the_earlier_one_stopped_reading():
    schedule = Schedule(tokens=100, context=10, sequences_per_step=4, peak=1.0, warmup=0.0, first_sequence=7)
    assert [position for step in range(3) for position in schedule.sequences(step)] == list(range(7, 17))
