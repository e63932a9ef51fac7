import numpy as np
import pytest
import torch

from refold.engine.randomness import RandomStream, absorb, key, mix, uniforms

COUNT = 200_000


def _numbers(seed: int = 1, choice: int = 0, stream: int = 0, count: int = COUNT) -> np.ndarray:
    return uniforms(np.full(count, key(seed, choice)), np.arange(count, dtype=np.uint64), stream)


def test_numbers_lie_in_the_unit_interval_and_are_even():
    numbers = _numbers()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, 256, (0, 1))
    squares = ((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum()
    assert 255 - 5 * 22.6 < squares < 255 + 5 * 22.6


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"choice": 1}, {"stream": RandomStream.ACCEPT}, {"seed": 1 + 2**62}], ids=str
)
def test_neighbouring_counters_are_not_related(other: dict):
    first, second = _numbers(), _numbers(**other)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / COUNT**0.5
    assert not (first == second).any()


def test_numbers_of_one_sequence_are_not_related():
    numbers = _numbers()
    for lag in (1, 2, 7):
        assert abs(np.corrcoef(numbers[lag:], numbers[:-lag])[0, 1]) < 5 / COUNT**0.5


def test_the_place_in_the_array_does_not_matter():
    places = np.array([5, 0, 9], dtype=np.uint64)
    keys = np.array([key(3, 0), key(3, 1), key(8, 0)])
    together = uniforms(keys, places, 0)
    alone = [uniforms(keys[at : at + 1], places[at : at + 1], 0)[0] for at in range(3)]
    assert together.tolist() == alone


def test_the_mixer_is_that_of_splitmix64():
    # First outputs of SplitMix64 for the seed 1234567, as its author published them.
    with np.errstate(over="ignore"):
        states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_order_of_numbers_counts():
    one, two = (np.array([each], dtype=np.uint64) for each in (1, 2))
    assert absorb(absorb(one, one), two) != absorb(absorb(one, two), one)


def test_the_global_generators_are_not_used():
    before = torch.random.get_rng_state()
    _numbers(count=4)
    assert torch.equal(before, torch.random.get_rng_state())
