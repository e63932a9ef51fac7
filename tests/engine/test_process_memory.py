"""The peak of a process's memory counts from the last time it was forgotten."""

import numpy as np
import pytest
import torch

from refold.engine.process_memory import forget_peak, read_peak

CPU = torch.device("cpu")


def test_a_peak_counts_from_where_it_was_forgotten() -> None:
    before = forget_peak(CPU)
    if before is None:
        pytest.skip("this system tells no peak of a process")
    block = np.ones(100 * 2**20, dtype=np.uint8)
    high = read_peak(CPU)
    assert high is not None
    assert 90 * 2**20 < high - before < 300 * 2**20
    del block
    after = forget_peak(CPU)
    low = read_peak(CPU)
    assert after is not None
    assert low is not None
    # The block is given back, and the peak no longer counts it.
    assert low < high - 50 * 2**20


def test_another_device_has_no_peak_here() -> None:
    assert forget_peak(torch.device("meta")) is None
    assert read_peak(torch.device("meta")) is None
