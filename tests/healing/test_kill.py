"""Kills at random moments: children of the fork server heal and are killed."""

import random
import time
from dataclasses import replace

import pytest
import torch

from refold.checkpoint.manifest import verify
from refold.healing.heal import heal
from refold.healing.run import HealOptions


def _kill_at_random_moments(healing, processes, weights, tmp_path, count, seed):
    whole = tmp_path / "whole"
    start = time.monotonic()
    healing(destination=whole, checkpoint_seconds=0.0)
    lasting = time.monotonic() - start
    chance = random.Random(seed)
    options = {"options": HealOptions(device="cpu", quiet=True, checkpoint_seconds=0.0)}
    kills = 0
    for _ in range(count):
        arguments = (healing.model, healing.destination, healing.data, healing.stage())
        child = processes.Process(target=heal, args=arguments, kwargs=options)
        child.start()
        child.join(chance.uniform(0.1, 1.2) * lasting)
        if child.is_alive():
            child.kill()
            kills += 1
        child.join()
        if healing.destination.exists():
            # There at all means there whole.
            assert verify(healing.destination) == ()
            expected, found = weights(whole), weights(healing.destination)
            assert all(torch.equal(expected[name], found[name]) for name in expected)
            options["options"] = replace(options["options"], overwrite=True)
    assert kills
    healing(overwrite=True)
    expected, found = weights(whole), weights(healing.destination)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["healed", "whole"]


def test_a_kill_leaves_nothing_or_all_and_the_run_resumes(healing, processes, weights, tmp_path):
    _kill_at_random_moments(healing, processes, weights, tmp_path, count=3, seed=0)


@pytest.mark.long
def test_twenty_kills_leave_nothing_or_all_and_the_run_resumes(healing, processes, weights, tmp_path):
    _kill_at_random_moments(healing, processes, weights, tmp_path, count=20, seed=1)
