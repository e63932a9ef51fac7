"""One safetensors file, written tensor by tensor."""

import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from refold.checkpoint.tensor_file import lay_out, write_tensors


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        "narrow": torch.arange(5, dtype=torch.bfloat16),
        "turned": torch.arange(12.0).view(3, 4).T,
        "none": torch.zeros(0, 7),
        "wide": torch.arange(3, dtype=torch.float64),
    }
    write_tensors(tmp_path / "file", tensors, {"shared": "yes"})
    found = load_file(tmp_path / "file")
    assert set(found) == set(tensors)
    assert all(found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"shared": "yes"}


def test_a_file_that_is_there_is_replaced_whole(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"a": torch.ones(1000)}, {})
    write_tensors(tmp_path / "file", {"b": torch.ones(2)}, {})
    assert list(load_file(tmp_path / "file")) == ["b"]


def test_every_tensor_begins_at_a_multiple_of_its_items(tmp_path: Path) -> None:
    specs = {"a": ((3,), torch.bfloat16), "b": ((5,), torch.float32), "c": ((1,), torch.float64)}
    head, places = lay_out(specs, {})
    assert [places[name][0] % size for name, size in (("a", 2), ("b", 4), ("c", 8))] == [0, 0, 0]
    assert places["c"] == (len(head), len(head) + 8)


def test_no_tensor_is_held_twice(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2**20), "b": torch.ones(2**20)}
    tracemalloc.start()
    try:
        write_tensors(tmp_path / "file", tensors, {})
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_folder_that_is_not_there_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_tensors(tmp_path / "nowhere" / "file", {"a": torch.ones(1)}, {})
