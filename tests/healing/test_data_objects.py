"""Healing on objects in memory: the same model as from a file, and resumed runs."""

import signal
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from refold.data.mixture import Mixture
from refold.data.readers import from_documents
from refold.errors import HealError
from refold.healing.interruption import HealInterrupted

TEXTS = [f"{letter} goes to {letter * (3 + index % 20)}." for index, letter in enumerate("abcdefghijklmnop" * 3)]


def test_lists_frames_and_generators_heal_to_the_bits_of_documents(healing: Any, tmp_path: Path, weights: Any):
    healing(data=from_documents(TEXTS), destination=tmp_path / "expected")
    expected = weights(tmp_path / "expected")
    made: dict[str, Any] = {
        "list": TEXTS,
        "frame": pandas.DataFrame({"text": TEXTS}),
        "generator": (text for text in TEXTS),
    }
    for name, data in made.items():
        result = healing(data=data, destination=tmp_path / name)
        found = weights(tmp_path / name)
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), name
        assert "on stories, which it did not read, from 0.17 to 0.13 alone" in result.notes[0]


def test_a_mixture_has_no_note(healing: Any):
    assert healing(data=Mixture([(TEXTS[:20], 1), (TEXTS[20:], 3)])).notes == ()


def test_a_run_on_a_generator_goes_on_with_the_same_texts_only(healing: Any, weights: Any, tmp_path: Path):
    def texts(last: str = "p goes on."):
        yield from TEXTS
        yield last

    whole = tmp_path / "whole"
    healing(data=texts(), destination=whole)

    healing.hook = lambda record: signal.raise_signal(signal.SIGTERM) if record.step == 8 else None
    with pytest.raises(HealInterrupted):
        healing(data=texts())
    healing.hook = None
    with pytest.raises(HealError, match="data"):
        healing(data=texts("another end."))
    result = healing(data=texts())
    assert result.resumed_from == 8
    found = weights(healing.destination)
    assert all(torch.equal(value, found[key]) for key, value in weights(whole).items())
