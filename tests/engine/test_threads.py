"""The number of threads, CPUs, and the policy by which threads wait."""

import logging

import pytest
import torch

from refold.engine.threads import count_cpus, set_threads
from refold.errors import RefoldError


@pytest.fixture(autouse=True)
def _restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_given_number_of_threads_is_set():
    assert set_threads(2).num_threads == torch.get_num_threads() == 2
    assert set_threads(1).num_threads == torch.get_num_threads() == 1


def test_without_a_number_there_are_no_more_threads_than_cpus():
    torch.set_num_threads(count_cpus() + 3)
    assert set_threads().num_threads == torch.get_num_threads() == count_cpus()


def test_more_threads_than_cpus_are_told(caplog):
    with caplog.at_level(logging.WARNING, "refold"):
        set_threads(count_cpus() + 1)
    assert "each product waits for the last of them" in caplog.text


@pytest.mark.parametrize(("policy", "threads", "told"), [("passive", 2, True), ("passive", 1, False), ("", 2, False)])
def test_threads_that_sleep_between_products_are_told(monkeypatch, caplog, policy, threads, told):
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    with caplog.at_level(logging.INFO, "refold"):
        assert set_threads(threads).sleeps_between_products is told
    assert ("OMP_WAIT_POLICY=PASSIVE" in caplog.text) is told


def test_no_thread_is_refused():
    with pytest.raises(RefoldError, match="threads: at least 1 is required"):
        set_threads(0)


@pytest.mark.parametrize(
    ("text", "cpus"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None), ("", None)]
)
def test_a_quota_limits_the_cpus(tmp_path, text, cpus):
    path = tmp_path / "cpu.max"
    path.write_text(text)
    assert count_cpus(path) == (cpus or count_cpus(tmp_path / "missing"))
